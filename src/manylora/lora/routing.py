"""The table says which adapter each row belongs to, while a forward and its backward run.

The table is opened by one writer around forward *and* backward, so that a layer recomputed under
activation checkpointing sees the table of its first forward, and deep layers need no arguments.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from manylora.kernels import RowBatch, SegmentWork
from manylora.lora.adapter import AdapterWeights


@dataclass(slots=True)
class Segment:
    """A segment is adjacent rows of the stream that one adapter (or none) acts on.

    Attributes:
        rows: how many.
        weights: the adapter's factors; None for rows of the bare base and for padding.
        draw: position in the adapter's random stream; each piece of work has its own.
    """

    rows: int
    weights: AdapterWeights | None
    draw: int = 0


@dataclass(slots=True)
class RoutingTable:
    """A table has the segments of one stream, and what each input group has to do for them.

    Attributes:
        segments: they cover the stream from its first row to its last.
        training: whether dropout applies.
        by_row: each row's low-rank terms are products of its own, for decoding.
        packed: products of the base read the weights that are kept for few rows, for decoding.
        row_batches: of each input group, for `by_row`.
        pending: of an input group the input, and by position the outputs that it has computed for
            members not called yet.
    """

    segments: Sequence[Segment]
    training: bool
    by_row: bool = False
    packed: bool = False
    sizes: list[int] = field(init=False)
    row_batches: dict[int, list[RowBatch]] = field(default_factory=dict)
    pending: dict[int, tuple[Tensor, dict[int, Tensor]]] = field(default_factory=dict)
    _work: dict[int, list[SegmentWork]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = [segment.rows for segment in self.segments]

    def work(self, group: int) -> list[SegmentWork]:
        """Return the segments whose adapter acts on this group, worked out once per stream."""
        if group not in self._work:
            self._work[group] = self._resolve(group)
        return self._work[group]

    def part(self, segment: int, within: int, group: int) -> list[SegmentWork]:
        """Return one group's work on rows of one segment that run by themselves, as segment 0;
        `within` is where they begin among the segment's rows, in the order in which they run."""
        return [
            replace(item, segment=0, seed=_mix(item.seed, within) if item.dropout else 0)
            for item in self.work(group)
            if item.segment == segment
        ]

    def _resolve(self, group: int) -> list[SegmentWork]:
        work = []
        for number, segment in enumerate(self.segments):
            weights = segment.weights
            if weights is None or segment.rows == 0:
                continue
            block = weights.blocks.get(group)
            if block is None:
                continue
            dropout = weights.spec.dropout if self.training else 0.0
            seed = _mix(weights.spec.seed, segment.draw, group) if dropout else 0
            work.append(SegmentWork(number, block, dropout, seed))
        return work


_current: RoutingTable | None = None


@contextmanager
def routing(table: RoutingTable) -> Iterator[RoutingTable]:
    """Make `table` the one that every adapted layer reads."""
    global _current
    assert _current is None, "a stream is already running"
    _current = table
    try:
        yield table
    finally:
        _current = None
        table.pending.clear()


def current_table() -> RoutingTable | None:
    """Return the table of the stream that is running, if any."""
    return _current


def _mix(*numbers: int) -> int:
    """Return a 62-bit hash of a few numbers (splitmix64's finaliser, folded over them)."""
    mask = (1 << 64) - 1
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & mask)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 2
