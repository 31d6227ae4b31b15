"""`manylora sample` lets a base and any number of adapters answer a prompt."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from manylora.cli.adapter_folder import AdapterFolder
    from manylora.types import SampledSequence, SamplingParams


@dataclass(frozen=True, slots=True)
class PrintedAnswer:
    """A `PrintedAnswer` is an answer as `--json` prints it.

    Attributes:
        answer: its text, without special tokens.
        stop_reason: `stop` (a token that ends an answer) or `length`.
        prompt_tokens: number of the prompt's tokens.
        tokens: number of the answer's tokens.
        token_ids: ids of the answer's tokens, the one that ended it included.
        logprobs: log-probability of each of them.
    """

    answer: str
    stop_reason: str
    prompt_tokens: int
    tokens: int
    token_ids: list[int]
    logprobs: list[float]


@click.command(
    epilog="Example: manylora sample --adapter runs/quickstart/reverse --prompt 'reverse: abc'",
    short_help="Let a base and any number of adapters answer a prompt, side by side.",
)
@click.option("--base", help="Base model; by default the one that the adapters name.")
@click.option(
    "--adapter",
    "folders",
    metavar="DIR",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A PEFT folder, a training state step-N, or an adapter's folder of a run. May be "
    "repeated; without it the bare base answers.",
)
@click.option("--prompt", help="What to continue; - or nothing = read it from standard input.")
@click.option(
    "--quantization",
    metavar="KIND",
    help="nf4 or int8: keep the base's weights in 4 or 8 bits, as in the run that trained on it.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the chat template.")
@click.option("--max-tokens", type=click.IntRange(1, 2**31 - 1), default=64, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.0,
    show_default=True,
    help="0 = always the likeliest token.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object per answer: text, ids, why it stopped, counts, log-probabilities.",
)
def sample(
    base: str | None,
    folders: tuple[Path, ...],
    prompt: str | None,
    quantization: str | None,
    chat: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    """Let a base and any number of adapters answer a prompt, side by side."""
    from manylora.cli.adapter_folder import common_base, find_adapter
    from manylora.types import SamplingParams

    adapters = [find_adapter(folder) for folder in folders]
    name = common_base(adapters, base)
    text = _prompt(prompt)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    answers = _answers(name, adapters, text, params, quantization=quantization, chat=chat)
    click.echo(_shown(answers, as_json=as_json))


def _answers(
    base: str,
    adapters: Sequence["AdapterFolder"],
    prompt: str,
    params: "SamplingParams",
    *,
    quantization: str | None,
    chat: bool,
) -> dict[str, PrintedAnswer]:
    """Return each adapter's answer by its label; without adapters, the base's by its name."""
    from manylora.api import Trainer
    from manylora.cli.adapter_folder import open_adapter

    with Trainer(base, quantization=quantization) as trainer:
        tokenizer = trainer.tokenizer
        labels = distinct([adapter.label for adapter in adapters])
        sampled = {
            label: open_adapter(trainer, f"a{number}", adapter)
            for number, (label, adapter) in enumerate(zip(labels, adapters, strict=True))
        }
        asked = {
            label: (one, as_trained(tokenizer, prompt, one, chat=chat))
            for label, one in (sampled or {base: trainer}).items()
        }
        # All are asked before any is waited for, so that they share one decode loop.
        futures = {label: one.sample([tokens], params) for label, (one, tokens) in asked.items()}
        return {
            label: answer_of(tokenizer, asked[label][1], future.result().sequences[0])
            for label, future in futures.items()
        }


def answer_of(tokenizer: Any, prompt: Sequence[int], sequence: "SampledSequence") -> PrintedAnswer:
    """Return a sampled sequence as a person and a machine read it."""
    return PrintedAnswer(
        answer=tokenizer.decode(list(sequence.tokens), skip_special_tokens=True),
        stop_reason=sequence.stop_reason,
        prompt_tokens=len(prompt),
        tokens=len(sequence.tokens),
        token_ids=list(sequence.tokens),
        logprobs=list(sequence.logprobs),
    )


def as_trained(tokenizer: Any, text: str, sampled: Any, *, chat: bool) -> list[int]:
    """Return the prompt as an adapter (or a trainer for its base) would have been trained on it."""
    from manylora.runs.encode import Encoder
    from manylora.types import ConfigError, DataError

    if tokenizer is None:
        raise ConfigError("this base has no tokenizer")
    text_format = getattr(sampled, "text_format", None)
    template = None if text_format is None else text_format.chat_template
    encoder = Encoder(tokenizer, chat_template=template)
    if chat and not encoder.template.exists:
        raise ConfigError("this base has no chat template; leave --chat away")
    tokens = encoder.prompt(text, chat=chat)
    if not tokens:
        raise DataError("the prompt has no tokens; give some text")
    return tokens


def distinct(labels: list[str]) -> list[str]:
    """Return labels that differ, by a number behind the later ones."""
    result: list[str] = []
    for label in labels:
        number, wanted = 2, label
        while wanted in result:
            wanted, number = f"{label} ({number})", number + 1
        result.append(wanted)
    return result


def printable(text: str) -> str:
    """Return `text` without what would steer a terminal: a model may write anything."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise click.UsageError("give --prompt, or text on standard input")
    return sys.stdin.read().removesuffix("\n")


def _shown(answers: Mapping[str, PrintedAnswer], *, as_json: bool) -> str:
    if as_json:
        return "\n".join(
            json.dumps({"adapter": label, **asdict(answer)}, ensure_ascii=False)
            for label, answer in answers.items()
        )
    texts = {label: printable(answer.answer) for label, answer in answers.items()}
    if len(texts) == 1:
        return next(iter(texts.values()))
    width = max(map(len, texts))
    indent = "\n" + " " * (width + 2)
    return "\n".join(
        f"{label.ljust(width)}  {text.replace(chr(10), indent)}" for label, text in texts.items()
    )
