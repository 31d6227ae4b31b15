"""An adapter is measured before, during and after training: mean loss and greedy answers."""

from asyncio import wrap_future
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from manylora.runs.course import Progress, Spend
from manylora.types import Datum, SamplingParams

# Small enough that training of the other adapters goes on between two chunks, and that progress
# moves; an adapter's chunks depend on its own data alone, so figures do not change with neighbours.
FORWARD_CHUNK = 16
SAMPLE_CHUNK = 16
# Of an answer that is asked for before evaluations are timed.
WARM_UP_TOKENS = 2


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """An `EvalPrompt` is a prompt whose greedy answer is shown before and after training.

    Attributes:
        text: the prompt as a person reads it.
        tokens: the prompt as the model reads it.
        expected: the answer that the data give; None = there is none to compare with.
    """

    text: str
    tokens: list[int]
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """A `GreedyAnswer` continues an evaluation prompt greedily, as samples.json holds it."""

    prompt: str
    expected: str | None
    answer: str
    exact: bool | None


@dataclass(frozen=True, slots=True)
class EvalSet:
    """An `EvalSet` measures held-out data by loss, and compares answers with expected ones.

    Attributes:
        max_tokens: longest answer.
        stop: tokens that end an answer; None = the base's.
        tokenizer: reads the answers.
    """

    data: Sequence[Datum] = ()
    prompts: Sequence[EvalPrompt] = ()
    max_tokens: int = 64
    stop: tuple[int, ...] | None = None
    tokenizer: Any = None

    def __bool__(self) -> bool:
        return bool(self.data or self.prompts)

    async def run(
        self, adapter: Any, tick: Progress, spend: Spend
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure the adapter as it is now; see `Evaluation.run`.

        The figures are `loss`, the mean per trained token (None = no data have one);
        `exact_match`, the share of answers equal to the expected ones, outer blanks apart; and
        `samples`, the number of answers that `exact_match` is about.
        """
        loss = await self._mean_loss(adapter, tick, spend) if self.data else None
        answers = await self._answers(adapter, tick, spend) if self.prompts else []
        judged = [answer.exact for answer in answers if answer.exact is not None]
        match = sum(judged) / len(judged) if judged else None
        figures = {"loss": loss, "exact_match": match, "samples": len(judged)}
        return figures, [asdict(answer) for answer in answers]

    async def warm_up(self, adapter: Any, tick: Progress) -> float:
        """See `Evaluation.warm_up`."""
        few = min(WARM_UP_TOKENS, self.max_tokens)
        one = replace(self, data=self.data[:1], prompts=self.prompts[:1], max_tokens=few)
        return sum(await one._seconds(adapter, tick))

    async def estimate(self, adapter: Any, tick: Progress) -> float:
        """See `Evaluation.estimate`: the first chunk of each kind is timed."""
        chunk = replace(self, data=self.data[:FORWARD_CHUNK], prompts=self.prompts[:SAMPLE_CHUNK])
        loss_seconds, answer_seconds = await chunk._seconds(adapter, tick)
        seconds = 0.0
        if self.data:
            lengths = [len(datum) for datum in self.data]
            seconds += loss_seconds * sum(lengths) / sum(lengths[:FORWARD_CHUNK])
        if self.prompts:
            asked = len(self.prompts)
            seconds += answer_seconds * asked / min(asked, SAMPLE_CHUNK)
        return seconds

    async def _seconds(self, adapter: Any, tick: Progress) -> tuple[float, float]:
        """Return the device seconds of the losses and of the answers."""
        loss: list[float] = []
        answers: list[float] = []
        if self.data:
            await self._mean_loss(adapter, tick, loss.append)
        if self.prompts:
            await self._answers(adapter, tick, answers.append)
        return sum(loss), sum(answers)

    async def _mean_loss(self, adapter: Any, tick: Progress, spend: Spend) -> float | None:
        """Return the mean loss per trained token; None when nothing is trained."""
        data = self.data
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

    async def _answers(self, adapter: Any, tick: Progress, spend: Spend) -> list[GreedyAnswer]:
        """Continue every prompt greedily."""
        prompts = self.prompts
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, stop=self.stop)
        chunks = [prompts[i : i + SAMPLE_CHUNK] for i in range(0, len(prompts), SAMPLE_CHUNK)]
        sequences: list[Any] = []

        def add(result: Any) -> None:
            sequences.extend(result.sequences)
            spend(result.device.share)
            tick("sampling", len(sequences), len(prompts))

        tick("sampling", 0, len(prompts))
        await _pipelined(chunks, lambda part: adapter.sample([p.tokens for p in part], params), add)
        return [self._answer(p, s) for p, s in zip(prompts, sequences, strict=True)]

    def _answer(self, prompt: EvalPrompt, sequence: Any) -> GreedyAnswer:
        text = self.tokenizer.decode(list(sequence.tokens), skip_special_tokens=True)
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


async def settle(pending: Iterable[Awaitable[Any]]) -> None:
    """Wait for what is still in flight, so that nothing ends unnoticed."""
    for one in pending:
        try:
            await one
        except Exception:  # the first error is the one that is reported
            continue
