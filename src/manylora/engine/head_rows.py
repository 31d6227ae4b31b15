"""The head runs on rows of a stream, in an order of its own.

First come the trained ones (see `Loss.trained`), in the order of the stream; behind them, in that
order too, those of which an operation wants to read the log-probabilities and nothing else. The
head runs on the first as if the second were not there, so an operation's loss and gradient have the
same bits whatever it wants to read. The rest is not asked for and costs nothing.

L rows of the head, N tokens of a datum, M targets beyond the first of each row.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from manylora.engine.plan import Piece
from manylora.losses import Loss, Settings
from manylora.types import Datum
from manylora.types.data import Array

Span = tuple[int, int]


@dataclass(slots=True)
class LossShare:
    """A `LossShare` is one loss of the micro-batch with the rows that it acts on (None = all).

    `spans` are the same rows as ranges.
    """

    loss: Loss
    settings: Settings
    rows_L: Tensor | None
    spans: list[Span] = field(default_factory=list)

    def within(self, start: int, stop: int) -> bool:
        """Say whether any of the rows [start, stop) is this loss's."""
        return self.rows_L is None or _any_within(self.spans, start, stop)


@dataclass(slots=True)
class MoreTargets:
    """`MoreTargets` are the targets of rows that have several, without the first, end to end.

    Attributes:
        ends: how many there are up to and including each row (on the host).
        counts_L: int64 [L], how many each row has.
        targets_M: int64.
        weights_M: fp32.
        weight_L: fp32 [L], the sum of each row's weights.
    """

    ends: Array
    counts_L: Tensor
    targets_M: Tensor
    weights_M: Tensor
    weight_L: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk is rows [start, stop) of the head that run together.

    Attributes:
        trained: whether they are trained; the others have no gradient.
        piece: the piece with an adapter on the head whose rows these are, and no others' are;
            None where no row has one.
        within: their place in the order of that piece's rows.
    """

    start: int
    stop: int
    trained: bool
    piece: int | None = None
    within: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """The chunk has these of the head's rows."""
        return slice(self.start, self.stop)


@dataclass(slots=True)
class HeadRows:
    """`HeadRows` say what the head and the losses need to know of the rows that they run on.

    Attributes:
        rows_L: int64 [L], which row of the stream each is.
        trained: of each piece its trained rows, among the L.
        read: of each piece those that are only read.
        lengths: of each datum its trained rows.
        targets_L: int64 [L].
        inputs: per-token inputs of the losses, fp32 [L]; zero where a row's loss has none.
        losses: usually one.
        more: None where every row has one target. Otherwise `targets_L` and `inputs` hold each
            row's first, and this the others.
        temperature_L: fp32 [L], of each row's operation; None where all are 1.
        tempered: the rows whose temperature is not 1.
        entropic: the rows whose entropy is asked.
    """

    rows_L: Tensor
    trained: list[Span]
    read: list[Span]
    lengths: list[int]
    targets_L: Tensor
    inputs: dict[str, Tensor]
    losses: list[LossShare]
    more: MoreTargets | None = None
    temperature_L: Tensor | None = None
    tempered: list[Span] = field(default_factory=list)
    entropic: list[Span] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.rows_L)

    def temperatures(self, chunk: Chunk) -> Tensor | None:
        """Return the temperatures [c] of a chunk's rows; None if all are 1."""
        if self.temperature_L is None or not _any_within(self.tempered, chunk.start, chunk.stop):
            return None
        return self.temperature_L[chunk.rows]

    def wants_entropy(self, chunk: Chunk) -> bool:
        """Say whether the entropy of any of a chunk's rows is asked."""
        return _any_within(self.entropic, chunk.start, chunk.stop)

    def more_span(self, start: int, stop: int) -> Span:
        """Find where the targets beyond the first of the rows [start, stop) lie in `more`."""
        if self.more is None:
            return 0, 0
        first, last = (int(self.more.ends[row - 1]) if row else 0 for row in (start, stop))
        return first, last

    def chunks(self, apart: Collection[int], longest: int) -> Iterator[Chunk]:
        """Return all rows in chunks of at most `longest`.

        Args:
            apart: pieces with an adapter on the head. Each is cut on a grid of its own, so that
                its factors' gradients are summed the same way wherever it lies.
        """
        for spans, trained in ((self.trained, True), (self.read, False)):
            for first, last, piece in _runs(spans, apart):
                before = 0 if piece is None or trained else _length(self.trained[piece])
                for start in range(first, last, longest):
                    stop = min(start + longest, last)
                    yield Chunk(start, stop, trained, piece, before + start - first)


def _runs(spans: Sequence[Span], apart: Collection[int]) -> Iterator[tuple[int, int, int | None]]:
    """Join neighbouring spans, those of `apart` by themselves and with their numbers."""
    if not spans:
        return
    begin = spans[0][0]
    for number in sorted(apart):
        first, last = spans[number]
        yield begin, first, None
        yield first, last, number
        begin = last
    yield begin, spans[-1][1], None


def _any_within(spans: Sequence[Span], start: int, stop: int) -> bool:
    """Say whether any of the rows [start, stop) lies in one of the spans."""
    return any(a < stop and start < b for a, b in spans)


def _length(span: Span) -> int:
    return span[1] - span[0]


def head_rows(
    pieces: Sequence[Piece],
    starts: Sequence[int],
    losses: Sequence[tuple[Loss, Settings]],
    device: torch.device,
) -> HeadRows:
    """Choose the rows of a stream and bring them into order. Each piece begins in the stream where
    `starts` says; the losses are those of the operations, by the pieces' `work`."""
    places: list[list[Array]] = [[], []]
    data: list[list[tuple[Datum, Array]]] = [[], []]
    lengths: list[int] = []
    for piece, start in zip(pieces, starts, strict=True):
        loss = losses[piece.work][0]
        masks = [loss.trained(datum) for datum in piece.data]
        lengths += [int(np.count_nonzero(mask_N)) for mask_N in masks]
        mask = np.concatenate(masks)
        untrained = ~mask & (piece.wanted == "all")
        for section, chosen in enumerate((mask, untrained)):
            places[section].append(start + np.flatnonzero(chosen))
            ends = np.cumsum([len(mask_N) for mask_N in masks])[:-1]
            data[section] += zip(piece.data, np.split(chosen, ends), strict=True)
    return _laid_out(pieces, places, [*data[0], *data[1]], lengths, losses, device)


def _laid_out(
    pieces: Sequence[Piece],
    places: Sequence[Sequence[Array]],
    data: Sequence[tuple[Datum, Array]],
    lengths: list[int],
    losses: Sequence[tuple[Loss, Settings]],
    device: torch.device,
) -> HeadRows:
    """Lay out `places`, each piece's trained and read rows; `data` says which of each datum's."""
    count = len(pieces)
    ends = np.cumsum([0, *(len(rows) for section in places for rows in section)]).tolist()
    spans = list(pairwise(ends))
    names = sorted({name for piece in pieces for name in _inputs(piece, losses[piece.work][0])})

    def column(name: str, dtype: type) -> Tensor:
        parts = [
            _first(datum.loss_inputs[name])[chosen_N]
            if name in datum.loss_inputs
            else np.zeros(np.count_nonzero(chosen_N), dtype)
            for datum, chosen_N in data
        ]
        return _joined(parts, dtype, device)

    return HeadRows(
        rows_L=_joined([*places[0], *places[1]], np.int64, device),
        trained=spans[:count],
        read=spans[count:],
        lengths=lengths,
        targets_L=column("target_tokens", np.int64),
        inputs={name: column(name, np.float32) for name in names},
        losses=_shares(pieces, losses, spans, device),
        more=_more_targets(data, device),
        temperature_L=_temperatures(pieces, spans, device),
        tempered=_spans_of(spans, [piece.temperature != 1.0 for piece in pieces]),
        entropic=_spans_of(spans, [piece.entropy for piece in pieces]),
    )


def _spans_of(spans: Sequence[Span], chosen: Sequence[bool]) -> list[Span]:
    """Return the spans that are not empty of the chosen pieces; `spans` of the pieces, twice."""
    both = zip(spans, [*chosen, *chosen], strict=True)
    return [span for span, own in both if own and _length(span)]


def _temperatures(
    pieces: Sequence[Piece], spans: Sequence[Span], device: torch.device
) -> Tensor | None:
    """Return each row's temperature, if any is not 1; `spans` of the pieces, twice."""
    if all(piece.temperature == 1.0 for piece in pieces):
        return None
    each = zip(spans, [*pieces, *pieces], strict=True)
    parts = [np.full(_length(span), piece.temperature) for span, piece in each]
    return _joined(parts, np.float32, device)


def _inputs(piece: Piece, loss: Loss) -> tuple[str, ...]:
    """Return what a piece's loss reads: what it needs, and what one of the data brings beside."""
    brought = [
        name for name in loss.optional if any(name in datum.loss_inputs for datum in piece.data)
    ]
    return (*loss.inputs, *brought)


def _first(values: Array) -> Array:
    """Return each position's only, or first, number."""
    return values if values.ndim == 1 else values[:, 0]


def _more_targets(data: Sequence[tuple[Datum, Array]], device: torch.device) -> MoreTargets | None:
    if all(datum.num_targets == 1 for datum, _ in data):
        return None
    counts: list[Array] = []
    weight: list[Array] = []
    targets: list[Array] = []
    weights: list[Array] = []
    for datum, chosen_N in data:
        rows = np.count_nonzero(chosen_N)
        counts.append(np.full(rows, datum.num_targets - 1))
        if datum.num_targets == 1:
            weight.append(np.zeros(rows, np.float32))
            continue
        others = datum.loss_inputs["weights"][chosen_N, 1:]
        weight.append(others.sum(axis=1, dtype=np.float64))
        targets.append(datum.loss_inputs["target_tokens"][chosen_N, 1:].ravel())
        weights.append(others.ravel())
    return MoreTargets(
        ends=np.cumsum(np.concatenate(counts)),
        counts_L=_joined(counts, np.int64, device),
        targets_M=_joined(targets, np.int64, device),
        weights_M=_joined(weights, np.float32, device),
        weight_L=_joined(weight, np.float32, device),
    )


def _shares(
    pieces: Sequence[Piece],
    losses: Sequence[tuple[Loss, Settings]],
    spans: Sequence[Span],
    device: torch.device,
) -> list[LossShare]:
    """Return the distinct losses, each with its own rows; `spans` of the pieces, twice."""
    distinct: list[tuple[Loss, Settings]] = []
    for piece in pieces:
        if losses[piece.work] not in distinct:
            distinct.append(losses[piece.work])
    if len(distinct) == 1:
        return [LossShare(*distinct[0], None)]
    shares = []
    for loss in distinct:
        mine = [losses[piece.work] == loss for piece in pieces] * 2
        flags = [np.full(_length(span), own) for span, own in zip(spans, mine, strict=True)]
        own_spans = [span for span, own in zip(spans, mine, strict=True) if own]
        shares.append(LossShare(*loss, _joined(flags, np.bool_, device), own_spans))
    return shares


def _joined(parts: Sequence[Array], dtype: type, device: torch.device) -> Tensor:
    """Join the parts end to end."""
    row = np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
    return torch.from_numpy(row).to(device, non_blocking=True)
