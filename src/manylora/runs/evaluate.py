"""Measuring an adapter before and after training: mean loss and greedy answers."""

from asyncio import wrap_future
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from manylora.runs.job import EvalPrompt, EvalSet
from manylora.types import Datum, SamplingParams

# Small enough that training of the other adapters goes on between two chunks, and that progress
# moves; an adapter's chunks depend on its own data alone, so figures do not change with neighbours.
FORWARD_CHUNK = 16
SAMPLE_CHUNK = 16

Tick = Callable[[str, int, int], None]
Spend = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """A greedy continuation of an evaluation prompt."""

    prompt: str
    expected: str | None
    answer: str
    exact: bool | None


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Figures of one evaluation.

    Attributes:
        loss: mean per trained token; None = there were no data with a loss.
        exact_match: share of answers equal to the expected ones, outer blanks apart.
        samples: number of answers that `exact_match` is about.
    """

    loss: float | None
    exact_match: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """As summary.json holds it."""
        return asdict(self)


async def evaluate(
    adapter: Any, tokenizer: Any, evals: EvalSet, tick: Tick, spend: Spend
) -> tuple[EvalResult, list[GreedyAnswer]]:
    """Measure `adapter` as it is now.

    Args:
        tick: told what is being done and how far it is; it may raise to end the evaluation.
        spend: told what each part cost, in seconds of the device.
    """
    loss = await mean_loss(adapter, evals.data, tick, spend) if evals.data else None
    answers = await greedy_answers(adapter, tokenizer, evals, tick, spend) if evals.prompts else []
    judged = [answer.exact for answer in answers if answer.exact is not None]
    match = sum(judged) / len(judged) if judged else None
    return EvalResult(loss, match, len(judged)), answers


async def mean_loss(adapter: Any, data: Sequence[Datum], tick: Tick, spend: Spend) -> float | None:
    """Mean loss per trained token; None when nothing is trained."""
    chunks = [data[i : i + FORWARD_CHUNK] for i in range(0, len(data), FORWARD_CHUNK)]
    weight = sum(float(np.sum(datum.loss_inputs["weights"])) for datum in data)
    total, done = 0.0, 0

    def add(result: Any) -> None:
        nonlocal total, done
        total += result.loss
        spend(result.device.share)
        done += FORWARD_CHUNK
        tick("evaluating", min(done, len(data)), len(data))

    tick("evaluating", 0, len(data))
    await _pipelined(chunks, lambda part: adapter.forward(part, logprobs="trained"), add)
    return total / weight if weight else None


async def greedy_answers(
    adapter: Any, tokenizer: Any, evals: EvalSet, tick: Tick, spend: Spend
) -> list[GreedyAnswer]:
    """Continue every prompt greedily."""
    prompts = evals.prompts
    params = SamplingParams(max_tokens=evals.max_tokens, temperature=0.0, stop=evals.stop)
    chunks = [prompts[i : i + SAMPLE_CHUNK] for i in range(0, len(prompts), SAMPLE_CHUNK)]
    sequences: list[Any] = []

    def add(result: Any) -> None:
        sequences.extend(result.sequences)
        spend(result.device.share)
        tick("sampling", len(sequences), len(prompts))

    tick("sampling", 0, len(prompts))
    await _pipelined(chunks, lambda part: adapter.sample([p.tokens for p in part], params), add)
    return [_answer(p, s, tokenizer) for p, s in zip(prompts, sequences, strict=True)]


def _answer(prompt: EvalPrompt, sequence: Any, tokenizer: Any) -> GreedyAnswer:
    text = tokenizer.decode(list(sequence.tokens), skip_special_tokens=True)
    exact = None if prompt.expected is None else text.strip() == prompt.expected.strip()
    return GreedyAnswer(prompt.text, prompt.expected, text, exact)


async def _pipelined(
    chunks: Sequence[Any], submit: Callable[[Any], Any], add: Callable[[Any], None]
) -> None:
    """Keep two chunks with the worker; results are added in order."""
    pending: deque[Awaitable[Any]] = deque()
    try:
        for chunk in chunks:
            pending.append(wrap_future(submit(chunk)))
            if len(pending) > 1:
                add(await pending.popleft())
        while pending:
            add(await pending.popleft())
    finally:
        await settle(pending)


async def settle(pending: deque[Awaitable[Any]]) -> None:
    """Wait for what is still in flight, so that nothing ends unnoticed."""
    while pending:
        try:
            await pending.popleft()
        except Exception:  # the first error is the one that is reported
            continue
