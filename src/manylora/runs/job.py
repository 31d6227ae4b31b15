"""What the loop of one adapter needs, whatever it was read from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from manylora.types import AdamParams, AdapterSpec, DataError, Datum, TextFormat

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """A prompt whose greedy answer is shown before and after training.

    Attributes:
        text: the prompt as a person reads it.
        tokens: the prompt as the model reads it.
        expected: the answer that the data give; None = there is none to compare with.
    """

    text: str
    tokens: list[int]
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class EvalSet:
    """What an adapter is measured on before and after training.

    Attributes:
        max_tokens: of an answer. stop: tokens that end one; None = the base's.
    """

    data: Sequence[Datum] = ()
    prompts: Sequence[EvalPrompt] = ()
    max_tokens: int = 64
    stop: tuple[int, ...] | None = None

    def __bool__(self) -> bool:
        return bool(self.data or self.prompts)


class Batches(Protocol):
    """The batch of each step: a pure function of the step (1, 2, …), so resuming is exact."""

    def __call__(self, step: int) -> Sequence[Datum]: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """What reading an adapter's data gives.

    Attributes:
        text_format: how its texts became tokens, to be recorded with the adapter.
        notes: what its owner should know.
    """

    steps: int
    batch: Batches
    adam: Callable[[int], AdamParams]
    evals: EvalSet = field(default_factory=EvalSet)
    text_format: TextFormat = field(default_factory=TextFormat)
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter's run.

    Attributes:
        steps: as far as it is known before the data are read (0 = not yet).
        prepare: reads and tokenises the data; may take long, reports progress, may raise.
        loss, loss_config: as `forward_backward` takes them.
        save_every: steps between training states; 0 = only at the end.
        eval_every: steps between evaluations; 0 = only before and after.
        keep: how many of the newest training states stay; None = all.
        init_from: a PEFT folder to start from.
    """

    name: str
    spec: AdapterSpec
    prepare: Callable[[Any, Progress], Prepared]
    steps: int = 0
    loss: str = "cross_entropy"
    loss_config: Mapping[str, Any] | None = None
    save_every: int = 0
    eval_every: int = 0
    keep: int | None = None
    init_from: Path | None = None


def mean_weights(batch: Sequence[Datum]) -> tuple[list[Datum], int]:
    """The batch with weights divided by their sum, and its number of trained tokens.

    The door sums weighted losses, so the loss of such a batch is the mean over its tokens.
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
