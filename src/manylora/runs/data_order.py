"""A run visits its examples in an order that depends on seed, epoch, size and shuffle alone.

Nothing is carried from step to step, so a resumed run goes on with the batch that it would have
had, and an adapter's data do not depend on what trains beside it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Return the number of batches in one epoch; the last may be smaller than the others."""
    return -(-size // batch_size)


def total_steps(
    size: int, batch_size: int, *, epochs: int | None = None, max_steps: int | None = None
) -> int:
    """Return the optimizer steps of a whole run, from exactly one of its two lengths."""
    if max_steps is not None and epochs is None:
        return max_steps
    if epochs is not None and max_steps is None:
        return epochs * steps_per_epoch(size, batch_size)
    raise ValueError("give exactly one of epochs and max_steps")


def epoch_order(*, seed: int, epoch: int, size: int, shuffle: bool) -> Indices:
    """Return every index from 0 to size - 1 once, in the order of this epoch (read-only)."""
    return _permutation(seed, epoch, size) if shuffle else _ascending(size)


# The adapters of a run take turns, each within one epoch for many steps.
@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, size: int) -> Indices:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(size).astype(np.int64)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=8)
def _ascending(size: int) -> Indices:
    order = np.arange(size, dtype=np.int64)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOrder:
    """A `DataOrder` gives the batches of one adapter's run.

    Attributes:
        size: number of examples, ≥ 1.
        batch_size: examples of one optimizer step, ≥ 1.
        seed: fixes the order of every epoch.
        shuffle: a new order for each epoch; otherwise always the file's.
    """

    size: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.batch_size < 1:
            raise ValueError(f"size {self.size} and batch_size {self.batch_size} must be ≥ 1")

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.size, self.batch_size)

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that a step (from 0) falls in."""
        return step // self.steps_per_epoch

    def batch_indices(self, step: int) -> Indices:
        """Return the examples of a step, from 0. An epoch's last batch holds what is left."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = epoch_order(seed=self.seed, epoch=epoch, size=self.size, shuffle=self.shuffle)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]
