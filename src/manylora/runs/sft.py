"""Supervised fine-tuning is a course: a step trains on a batch that its number alone decides."""

from asyncio import Future, wrap_future
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from manylora.runs.columns import Column, CourseColumns
from manylora.runs.course import Progress, StepFigures
from manylora.runs.evaluate import EvalSet, settle
from manylora.runs.run_folder import AdapterPaths
from manylora.types import AdamParams, DataError, Datum, TextFormat

# The loss is the mean over a batch's trained tokens, the gradient's norm L2 before clipping.
SFT_COLUMNS = CourseColumns(
    step=(
        Column("loss", "loss", better="lower", total="ends", charted=True, checked=True),
        Column("lr", charted=True),
        Column("grad_norm", "gradient norm", charted=True, checked=True),
        Column("tokens", total="sum"),
        Column("trained_tokens", total="sum", tracked=False),
    ),
    evaluation=(
        Column("loss", "eval loss", better="lower"),
        Column("exact_match", "exact match", "share", better="higher", counted_by="samples"),
        Column("samples", tracked=False),
    ),
)


# Gives the batch of each step (1, 2, …) as a pure function, so resuming is exact.
Batches = Callable[[int], Sequence[Datum]]


@dataclass(frozen=True, slots=True)
class SftStep:
    """An `SftStep` is a step whose two operations have been submitted."""

    lr: float
    tokens: int
    trained_tokens: int
    loss: Future[Any]
    update: Future[Any]

    async def read(self) -> StepFigures:
        """Wait for both operations."""
        result, update = await self.loss, await self.update
        figures = {
            "loss": float(result.loss),
            "lr": self.lr,
            "grad_norm": float(update.grad_norm),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }
        return StepFigures(figures, result.device, update.device)

    def give_up(self) -> bool:
        """Both are with the worker, and soon over."""
        return False

    async def settle(self) -> None:
        """Wait for both operations, whatever becomes of them."""
        await settle((self.loss, self.update))


@dataclass(frozen=True, slots=True)
class SftCourse:
    """An `SftCourse` is what reading an adapter's data gives; see `runs/course.py::Course`.

    Attributes:
        batch: the data of each step.
        adam: the optimizer's parameters of each step.
    """

    steps: int
    batch: Batches
    adam: Callable[[int], AdamParams]
    evals: EvalSet = field(default_factory=EvalSet)
    eval_every: int = 0
    text_format: TextFormat = field(default_factory=TextFormat)
    notes: Sequence[str] = ()
    # So that the worker always has work of this adapter to merge.
    ahead: int = 2

    def start(self, adapter: Any, step: int) -> SftStep:
        """Submit both operations of a step before either is awaited."""
        batch, trained = mean_weights(self.batch(step))
        adam = self.adam(step)
        # Of an answer to a long prompt little is trained, and the rest is never looked at.
        loss = adapter.forward_backward(batch, loss="cross_entropy", logprobs="trained")
        update = adapter.optim_step(adam)
        tokens = sum(len(datum) for datum in batch)
        return SftStep(adam.lr, tokens, trained, wrap_future(loss), wrap_future(update))

    def watch(self, tell: Progress) -> None:
        """A step waits for nothing but the engine."""

    async def begin(
        self, adapter: Any, paths: AdapterPaths | None, step: int, memory: Mapping[str, Any]
    ) -> None:
        """Nothing is to be got ready: batches and learning rates follow from the step."""

    def memory(self) -> dict[str, Any]:
        """A training state needs nothing, for the same reason."""
        return {}

    async def keep(self) -> None:
        """Nothing stands beside a training state."""

    async def end(self) -> None:
        """Nothing is at work between steps."""


def mean_weights(batch: Sequence[Datum]) -> tuple[list[Datum], int]:
    """Return the batch with weights divided by their sum, and its number of trained tokens.

    An adapter sums weighted losses, so the loss of such a batch is the mean over its tokens.
    """
    weights = [datum.loss_inputs["weights"] for datum in batch]
    total = sum(float(np.sum(w, dtype=np.float64)) for w in weights)
    if not total > 0:
        raise DataError("a batch has no token to train on; every weight in it is 0")
    scaled = [
        replace(datum, loss_inputs={**datum.loss_inputs, "weights": w / np.float32(total)})
        for datum, w in zip(batch, weights, strict=True)
    ]
    return scaled, sum(int(np.count_nonzero(w)) for w in weights)
