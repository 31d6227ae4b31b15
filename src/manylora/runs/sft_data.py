"""The data of supervised fine-tuning go from an adapter's entry to its batches and evaluation."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from manylora.config import MOST_STEPS, AdapterEntry, SftSettings
from manylora.runs.course import Progress, refuse_unwritable
from manylora.runs.data_order import DataOrder, total_steps
from manylora.runs.data_rows import Example
from manylora.runs.encode import Between, Encoded, Encoder, nothing
from manylora.runs.evaluate import EvalPrompt, EvalSet
from manylora.runs.schedule import scheduled_lr
from manylora.runs.sft import SftCourse
from manylora.runs.sources import Source, read_source
from manylora.types import AdamParams, DataError, Datum, DatumTooLong, TextFormat

if TYPE_CHECKING:
    from manylora.models.vocabulary import Vocabulary

# Answers that are generated before and after training, at most: enough to see and to count.
MAX_SAMPLES = 64
# Room for an answer that is a little longer than the expected ones, and a bound on all of them.
EXTRA_TOKENS, MAX_ANSWER_TOKENS = 8, 256

# Tokenising as many takes long enough to be worth a line in a log.
ANNOUNCED_EXAMPLES = 5000

# Reads the training or the evaluation data of an adapter.
Read = Callable[[Literal["train", "eval"]], Source]


def prepare_sft(
    entry: AdapterEntry,
    client: Any,
    progress: Progress,
    read: Read | None = None,
    between: Between = nothing,
) -> SftCourse:
    """Read and tokenise everything, so that a bad line is found before the first step.

    Args:
        read: where the data come from, if not from what the entry names.
        between: called every few examples while they are tokenised.

    Raises:
        DataError, DatumTooLong: a line is wrong, or too long; it is named with its file.
        Unsupported: its layers cannot be written as PEFT's files.
    """
    sft = SftSettings.of(entry)
    read = read or (lambda which: read_source(sft.sources()[which]))
    if client.tokenizer is None:
        raise DataError("the base's folder has no tokenizer, so text cannot be read")
    refuse_unwritable(entry, client.sites)
    encoder = entry_encoder(entry, client.tokenizer, client.vocabulary, between)
    trained = _encoded(encoder, read("train"), client, progress, "training data")
    data = trained.data
    order = DataOrder(
        size=len(data), batch_size=sft.batch_size, seed=entry.seed, shuffle=sft.shuffle
    )
    steps = total_steps(len(data), sft.batch_size, epochs=sft.epochs, max_steps=sft.max_steps)
    if steps > MOST_STEPS:
        raise DataError(
            f"{sft.epochs:,} epochs of these data are {steps:,} steps; at most {MOST_STEPS:,} are "
            "made: give fewer epochs, or max_steps"
        )

    def batch(step: int) -> Sequence[Datum]:
        return [data[i] for i in order.batch_indices(step - 1)]

    def adam(step: int) -> AdamParams:
        return entry.optimizer.adam_params(scheduled_lr(entry.optimizer, step - 1, steps))

    notes = [*ends_notes(entry, client.tokenizer, client.vocabulary), *trained.notes]
    text_format = TextFormat(encoder.stops(trained), entry.chat_template)
    evals = EvalSet()
    if sft.eval is not None:
        source = read("eval")
        held_out = _encoded(encoder, source, client, progress, "evaluation data")
        notes += [note for note in held_out.notes if note not in notes]
        evals = eval_set(source, held_out, client.tokenizer, text_format.stop)
    return SftCourse(steps, batch, adam, evals, sft.eval_every, text_format, notes)


def entry_encoder(
    entry: AdapterEntry, tokenizer: Any, vocabulary: "Vocabulary", between: Between = nothing
) -> Encoder:
    """Return how an entry's texts become tokens on a base. Raises ConfigError."""
    return Encoder(
        tokenizer,
        eos=SftSettings.of(entry).eos,
        chat_template=entry.chat_template,
        ends=vocabulary.ends,
        vocab_size=vocabulary.size,
        between=between,
    )


def ends_notes(entry: AdapterEntry, tokenizer: Any, vocabulary: "Vocabulary") -> list[str]:
    """Tell where a base's files disagree about the token that ends an answer."""
    own, given = tokenizer.eos_token_id, SftSettings.of(entry).eos
    if given is not None or own is None or not vocabulary.ends or own in vocabulary.ends:
        return []
    named = ", ".join(repr(tokenizer.decode([token])) for token in vocabulary.ends)
    return [
        f"tokenizer_config.json ends a text with {tokenizer.decode([own])!r}, "
        f"{vocabulary.named_in} an answer with {named}; prompt/completion and text rows are "
        f"trained to end with {tokenizer.decode([own])!r}, and answers stop at either. Choose one "
        "with sft.eos"
    ]


def _encoded(
    encoder: Encoder, source: Source, client: Any, progress: Progress, what: str
) -> Encoded:
    short = len(source) < ANNOUNCED_EXAMPLES
    progress(f"tokenising {what} ({len(source):,} examples)", 0, 1 if short else 0)
    encoded = encoder.encode(source)
    limit = client.context_length
    for number, datum in zip(encoded.owners, encoded.data, strict=True):
        example = source.examples[number]
        # One token more was tokenised; the last one is only ever predicted.
        if limit and len(datum) > limit:
            raise DatumTooLong(
                f"{source.place(example)}: has {len(datum) + 1} tokens; the base's context holds "
                f"{limit}, so shorten or drop this example"
            )
    return encoded


def eval_set(source: Source, encoded: Encoded, tokenizer: Any, stop: tuple[int, ...]) -> EvalSet:
    """Measure everything by loss; the first examples that have an answer are also asked."""
    prompts: list[EvalPrompt] = []
    longest = 1
    if source.kind != "text":
        # Of a conversation that became several data, the last holds the last answer.
        last = dict(zip(encoded.owners, encoded.data, strict=True))
        for number, example in enumerate(source.examples[:MAX_SAMPLES]):
            datum = last[number]
            start, end = _last_answer(datum)
            # A template may write more into a turn than its content; all of it is trained.
            learned = datum.loss_inputs["target_tokens"][start:end].tolist()
            expected = (
                example.texts[-1]
                if example.texts
                else tokenizer.decode(learned, skip_special_tokens=True)
            )
            prompt = datum.tokens[: start + 1].tolist()
            prompts.append(EvalPrompt(_prompt_text(example), prompt, expected))
            longest = max(longest, end - start)
    max_tokens = min(longest + EXTRA_TOKENS, MAX_ANSWER_TOKENS)
    return EvalSet(encoded.data, prompts, max_tokens, stop, tokenizer)


def _last_answer(datum: Datum) -> tuple[int, int]:
    """Return the positions, from and to, that predict the last answer.

    Prompts are cut out of what is trained, so they are tokenised exactly as it is.
    """
    trained = np.flatnonzero(datum.loss_inputs["weights"])
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = trained[gaps[-1] + 1] if len(gaps) else trained[0]
    return int(start), int(trained[-1]) + 1


def _prompt_text(example: Example) -> str:
    if example.texts:
        return example.texts[0]
    last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
    return "\n".join(f"{turn.role}: {turn.content or ''}" for turn in example.messages[:last])
