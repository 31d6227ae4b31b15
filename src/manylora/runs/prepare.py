"""From a run file's entry to what the loop of an adapter needs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from manylora.config import AdapterEntry
from manylora.runs.encode import encode_source
from manylora.runs.job import EvalPrompt, EvalSet, Job, Prepared, Progress
from manylora.runs.order import DataOrder, total_steps
from manylora.runs.schedule import scheduled_lr
from manylora.runs.sources import Example, Source, read_source
from manylora.types import AdamParams, DataError, Datum, DatumTooLong

# Answers that are generated before and after training, at most: enough to see and to count.
MAX_SAMPLES = 64
# Room for an answer that is a little longer than the expected ones, and a bound on all of them.
EXTRA_TOKENS, MAX_ANSWER_TOKENS = 8, 256

# Tokenising as many takes long enough to be worth a line in a log.
ANNOUNCED_EXAMPLES = 5000


# Reads the training or the evaluation data of an adapter.
Read = Callable[[Literal["train", "eval"]], Source]


def plan_job(entry: AdapterEntry, *, name: str | None = None, read: Read | None = None) -> Job:
    """The job of one adapter; its data are read later, by `prepare`.

    Args:
        name: of the adapter at the door; by default the entry's.
        read: where its data come from, if not from what the entry names.
    """

    def prepare(door: Any, progress: Progress) -> Prepared:
        return prepare_sft(entry, door, progress, read)

    return Job(
        name=entry.name if name is None else name,
        spec=entry.spec(),
        prepare=prepare,
        steps=entry.sft.max_steps or 0,
        save_every=entry.save_every,
        init_from=entry.lora.init_from,
    )


def prepare_sft(
    entry: AdapterEntry, door: Any, progress: Progress, read: Read | None = None
) -> Prepared:
    """Read and tokenise everything, so that a bad line is found before the first step.

    Args:
        read: where the data come from, if not from what the entry names.

    Raises:
        DataError: a line that is wrong, named with its file; DatumTooLong: or is too long.
    """
    sft = entry.sft

    def read_named(which: Literal["train", "eval"]) -> Source:
        named = sft.train if which == "train" else sft.eval
        assert named is not None
        return read_source(named)

    read = read or read_named
    data = _encoded(read("train"), door, progress, "training data")
    order = DataOrder(
        size=len(data), batch_size=sft.batch_size, seed=entry.seed, shuffle=sft.shuffle
    )
    steps = total_steps(len(data), sft.batch_size, epochs=sft.epochs, max_steps=sft.max_steps)

    def batch(step: int) -> Sequence[Datum]:
        return [data[i] for i in order.batch_indices(step - 1)]

    def adam(step: int) -> AdamParams:
        return entry.optimizer.adam_params(scheduled_lr(entry.optimizer, step - 1, steps))

    evals = EvalSet()
    if sft.eval is not None:
        source = read("eval")
        held_out = _encoded(source, door, progress, "evaluation data")
        evals = eval_set(source, held_out, door.tokenizer)
    return Prepared(steps, batch, adam, evals)


def _encoded(source: Source, door: Any, progress: Progress, what: str) -> list[Datum]:
    if door.tokenizer is None:
        raise DataError("the base's folder has no tokenizer, so text cannot be read")
    short = len(source) < ANNOUNCED_EXAMPLES
    progress(f"tokenising {what} ({len(source):,} examples)", 0, 1 if short else 0)
    data = encode_source(source, door.tokenizer)
    limit = door.context_length
    for example, datum in zip(source.examples, data, strict=True):
        # One token more was tokenised; the last one is only ever predicted.
        if limit and len(datum) > limit:
            raise DatumTooLong(
                f"{source.place(example)}: has {len(datum) + 1} tokens; the base's context holds "
                f"{limit}, so shorten or drop this example"
            )
    return data


def eval_set(source: Source, data: Sequence[Datum], tokenizer: Any) -> EvalSet:
    """Everything is measured by loss; the first examples that have an answer are also asked."""
    prompts: list[EvalPrompt] = []
    longest = 1
    if source.kind != "text":
        for example, datum in zip(source.examples[:MAX_SAMPLES], data, strict=False):
            start, end = _last_answer(datum)
            expected = (
                example.texts[-1]
                if example.texts
                # A template may write more into a turn than its content; all of it is trained.
                else tokenizer.decode(
                    datum.loss_inputs["target_tokens"][start:end].tolist(),
                    skip_special_tokens=True,
                )
            )
            prompt = datum.tokens[: start + 1].tolist()
            prompts.append(EvalPrompt(_prompt_text(example), prompt, expected))
            longest = max(longest, end - start)
    return EvalSet(data, prompts, min(longest + EXTRA_TOKENS, MAX_ANSWER_TOKENS))


def _last_answer(datum: Datum) -> tuple[int, int]:
    """The positions, from and to, that predict the last answer.

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
    return "\n".join(f"{turn.role}: {turn.content}" for turn in example.messages[:last])
