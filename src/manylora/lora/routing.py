"""Which adapter each row of the stream belongs to, while a forward and its backward run.

The table is opened by one writer around forward *and* backward, so that a layer recomputed under
activation checkpointing sees the table of its first forward, and deep layers need no arguments.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from manylora.kernels import SegmentWork, whole_products
from manylora.lora.adapter import AdapterWeights

# On CPU a row's low-rank product has the same bits whatever the number of rows of its segment, as
# long as that is a multiple of this (measured: 16 suffices, 8 does not) and the CPU's library does
# not look at the number of rows; if it does, of pieces of so many rows each.
SEGMENT_MULTIPLE = 16


@dataclass(slots=True)
class Segment:
    """Adjacent rows of the stream that one adapter (or none) acts on.

    Attributes:
        rows: how many.
        weights: the adapter's factors; None for rows of the bare base and for padding.
        draw: position in the adapter's random stream; each piece of work has its own.
    """

    rows: int
    weights: AdapterWeights | None
    draw: int = 0


@dataclass(slots=True)
class Spread:
    """The rows that have an adapter, each segment filled up to a safe number of rows.

    For decoding, where a segment is as long as its adapter has sequences just then: each must get
    the bits that it gets alone. Not for streams that need a gradient.

    Attributes:
        rows: int64, which row of the stream each spread row is.
        own: int64, the rows of the stream that have an adapter.
        back: int64, where each of those is among the spread ones.
        sizes: spread rows of each piece, a segment or a part of one.
        pieces: which segment each piece is of.
    """

    rows: Tensor
    own: Tensor
    back: Tensor
    sizes: list[int]
    pieces: list[int]


def spread(
    segments: Sequence[Segment], device: torch.device, base_dtype: torch.dtype
) -> Spread | None:
    """How to spread these segments; None if they are safe as they lie."""
    rows: list[int] = []
    own: list[int] = []
    back: list[int] = []
    sizes: list[int] = []
    pieces: list[int] = []
    start = 0
    for number, segment in enumerate(segments):
        if segment.weights is not None and segment.rows:
            size = -(-segment.rows // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE
            own += range(start, start + segment.rows)
            back += range(len(rows), len(rows) + segment.rows)
            rows += range(start, start + segment.rows)
            rows += [start] * (size - segment.rows)
            dtype = torch.promote_types(segment.weights.weights_P.dtype, base_dtype)
            piece = size if whole_products(device, dtype) else SEGMENT_MULTIPLE
            sizes += [piece] * (size // piece)
            pieces += [number] * (size // piece)
        start += segment.rows
    if rows == own and len(pieces) == len(set(pieces)):
        return None
    at, own_at, back_at = (torch.tensor(places).to(device) for places in (rows, own, back))
    return Spread(at, own_at, back_at, sizes, pieces)


@dataclass(slots=True)
class RoutingTable:
    """The segments of one stream, and what each input group has to do for them.

    Attributes:
        segments: they cover the stream from its first row to its last.
        training: whether dropout applies.
        spread: how to spread the rows for the low-rank products; None = as they lie.
        pending: outputs that an input group has computed for members not called yet.
    """

    segments: Sequence[Segment]
    training: bool
    spread: Spread | None = None
    sizes: list[int] = field(init=False)
    pending: dict[int, tuple[Tensor, list[Tensor | None]]] = field(default_factory=dict)
    _work: dict[int, list[SegmentWork]] = field(default_factory=dict)
    _spread_work: dict[int, list[SegmentWork]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = [segment.rows for segment in self.segments]

    def work(self, group: int) -> list[SegmentWork]:
        """The segments whose adapter acts on this input group; worked out once per stream."""
        if group not in self._work:
            self._work[group] = self._resolve(group)
        return self._work[group]

    def spread_work(self, group: int) -> list[SegmentWork]:
        """The same for the pieces that the rows are spread to."""
        assert self.spread is not None
        if group not in self._spread_work:
            of = {item.segment: item for item in self.work(group)}
            self._spread_work[group] = [
                replace(of[segment], segment=piece)
                for piece, segment in enumerate(self.spread.pieces)
                if segment in of
            ]
        return self._spread_work[group]

    def part(self, segment: int, within: int, group: int) -> list[SegmentWork]:
        """The work of one group on rows of one segment that run by themselves, as segment 0.

        Args:
            within: where they begin among the segment's rows, in the order in which they run.
        """
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
    """The table of the stream that is running, if any."""
    return _current


def _mix(*numbers: int) -> int:
    """A 62-bit hash of a few numbers (splitmix64's finaliser, folded over them)."""
    mask = (1 << 64) - 1
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & mask)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 2
