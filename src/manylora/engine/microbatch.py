"""One packed stream with everything that its forward, loss and backward need.

T tokens of the stream, padding rows at its end included; M targets beyond the first of each row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from manylora.engine.plan import Piece
from manylora.lora.adapter import Adapter
from manylora.lora.routing import Segment
from manylora.losses import Loss, Settings
from manylora.models.stream import padded_rows
from manylora.types import Datum
from manylora.types.data import Array


@dataclass(slots=True)
class LossShare:
    """One loss of the micro-batch and the rows that it acts on (None = all of them).

    `spans` are the same rows as ranges.
    """

    loss: Loss
    settings: Settings
    rows_T: Tensor | None
    spans: list[tuple[int, int]] = field(default_factory=list)

    def within(self, start: int, stop: int) -> bool:
        """Whether any of the rows [start, stop) is this loss's."""
        return self.rows_T is None or any(a < stop and start < b for a, b in self.spans)


@dataclass(slots=True)
class MoreTargets:
    """The targets of rows that have several, without each row's first, end to end.

    Attributes:
        ends: how many there are up to and including each row (on the host).
        counts_T: int64 [T], how many each row has.
        targets_M: int64; weights_M: fp32.
        weight_T: fp32 [T], the sum of each row's weights.
    """

    ends: Array
    counts_T: Tensor
    targets_M: Tensor
    weights_M: Tensor
    weight_T: Tensor


@dataclass(slots=True)
class MicroBatch:
    """A packed stream.

    Attributes:
        pieces: in stream order; starts: first row of each.
        lengths: tokens of each sequence.
        tokens_T, positions_T, targets_T: int64 [T].
        inputs: per-token inputs of the losses, fp32 [T]; zero where a row's loss has none.
        losses: usually one.
        segments: one per piece, and one for the padding.
        more: None where every row has one target. Otherwise `targets_T` and `inputs` hold each
            row's first, and this the others.
    """

    pieces: Sequence[Piece]
    starts: list[int]
    lengths: list[int]
    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    inputs: dict[str, Tensor]
    losses: list[LossShare]
    segments: list[Segment]
    more: MoreTargets | None = None

    @property
    def total(self) -> int:
        return len(self.tokens_T)

    def more_span(self, start: int, stop: int) -> tuple[int, int]:
        """Where the targets beyond the first of the rows [start, stop) lie in `more`."""
        if self.more is None:
            return 0, 0
        first, last = (int(self.more.ends[row - 1]) if row else 0 for row in (start, stop))
        return first, last


def build(
    pieces: Sequence[Piece],
    adapters: Mapping[str, Adapter],
    losses: Sequence[tuple[Loss, Settings]],
    *,
    backward: bool,
    device: torch.device,
) -> MicroBatch:
    """Lay pieces end to end. Without any, the stream is padding alone.

    Args:
        losses: of each operation, by the pieces' `work`.
        backward: whether the adapters need a gradient to add to.
    """
    data = [datum for piece in pieces for datum in piece.data]
    lengths = [len(datum) for datum in data]
    rows = sum(lengths)
    total = padded_rows(max(rows, 1))
    starts = np.cumsum([0, *(piece.rows for piece in pieces)])[:-1].tolist()
    names = sorted({name for piece in pieces for name in losses[piece.work][0].inputs})
    columns = {
        name: [
            _first(datum.loss_inputs[name])
            if name in datum.loss_inputs
            else np.zeros(len(datum), np.float32)
            for datum in data
        ]
        for name in names
    }
    segments = []
    for piece in pieces:
        adapter = adapters[piece.adapter]
        segments.append(Segment(piece.rows, adapter.weights, piece.draw))
        if backward:
            adapter.require_grad()
    segments.append(Segment(total - rows, None))
    return MicroBatch(
        pieces=pieces,
        starts=starts,
        lengths=lengths,
        tokens_T=_tokens([datum.tokens for datum in data], total, device),
        positions_T=_tokens([np.arange(n) for n in lengths], total, device),
        targets_T=_tokens([_first(d.loss_inputs["target_tokens"]) for d in data], total, device),
        inputs={name: _stream(values, total, device) for name, values in columns.items()},
        losses=_shares(pieces, losses, total, device),
        segments=segments,
        more=_more_targets(data, total, device),
    )


def _first(values: Array) -> Array:
    """Each position's only, or first, number."""
    return values if values.ndim == 1 else values[:, 0]


def _more_targets(data: Sequence[Datum], total: int, device: torch.device) -> MoreTargets | None:
    if all(datum.num_targets == 1 for datum in data):
        return None
    counts = np.zeros(total, np.int64)
    weight = np.zeros(total, np.float32)
    targets: list[Array] = []
    weights: list[Array] = []
    start = 0
    for datum in data:
        if datum.num_targets > 1:
            others = datum.loss_inputs["weights"][:, 1:]
            rows = slice(start, start + len(datum))
            counts[rows], weight[rows] = others.shape[1], others.sum(axis=1, dtype=np.float64)
            targets.append(datum.loss_inputs["target_tokens"][:, 1:].ravel())
            weights.append(others.ravel())
        start += len(datum)
    counts_T, targets_M, weights_M, weight_T = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (counts, np.concatenate(targets), np.concatenate(weights), weight)
    )
    return MoreTargets(np.cumsum(counts), counts_T, targets_M, weights_M, weight_T)


def _tokens(parts: Sequence[Array], total: int, device: torch.device) -> Tensor:
    return _stream(parts or [np.zeros(0, np.int64)], total, device)


def _stream(parts: Sequence[Array], total: int, device: torch.device) -> Tensor:
    """The parts end to end, zeros up to `total`."""
    row = np.zeros(total, parts[0].dtype)
    np.concatenate(parts, out=row[: sum(len(part) for part in parts)])
    return torch.from_numpy(row).to(device, non_blocking=True)


def _shares(
    pieces: Sequence[Piece],
    losses: Sequence[tuple[Loss, Settings]],
    total: int,
    device: torch.device,
) -> list[LossShare]:
    """The distinct losses of the stream, each with its rows."""
    distinct: list[tuple[Loss, Settings]] = []
    for piece in pieces:
        if losses[piece.work] not in distinct:
            distinct.append(losses[piece.work])
    if len(distinct) == 1:
        return [LossShare(*distinct[0], None)]
    shares = []
    for loss in distinct:
        flags = [np.full(piece.rows, losses[piece.work] == loss) for piece in pieces]
        ends = np.cumsum([piece.rows for piece in pieces]).tolist()
        spans = [
            (end - piece.rows, end)
            for piece, end in zip(pieces, ends, strict=True)
            if losses[piece.work] == loss
        ]
        shares.append(LossShare(*loss, _stream(flags, total, device), spans))
    return shares
