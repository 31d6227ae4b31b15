"""One packed stream with everything that its forward, loss and backward need.

T tokens of the stream, padding rows at its end included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manylora.engine.plan import Piece
from manylora.lora.adapter import Adapter
from manylora.lora.routing import Segment
from manylora.losses import Loss, Settings
from manylora.models.stream import padded_rows
from manylora.types.data import Array


@dataclass(slots=True)
class LossShare:
    """One loss of the micro-batch and the rows that it acts on (None = all of them)."""

    loss: Loss
    settings: Settings
    rows_T: Tensor | None


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

    @property
    def total(self) -> int:
        return len(self.tokens_T)


def build(
    pieces: Sequence[Piece],
    adapters: Mapping[str, Adapter],
    losses: Sequence[tuple[Loss, Settings]],
    *,
    backward: bool,
    device: torch.device,
) -> MicroBatch:
    """Lay pieces end to end. With `backward`, each takes the next place in its adapter's random
    stream.

    Args:
        losses: of each operation, by the pieces' `work`.
    """
    data = [datum for piece in pieces for datum in piece.data]
    lengths = [len(datum) for datum in data]
    rows, total = sum(lengths), padded_rows(sum(lengths))
    starts = np.cumsum([0, *(piece.rows for piece in pieces)])[:-1].tolist()
    names = sorted({name for piece in pieces for name in losses[piece.work][0].inputs})
    columns = {
        name: [
            datum.loss_inputs[name]
            if name in datum.loss_inputs
            else np.zeros(len(datum), np.float32)
            for datum in data
        ]
        for name in names
    }
    segments = []
    for piece in pieces:
        adapter = adapters[piece.adapter]
        segments.append(Segment(piece.rows, adapter.weights, adapter.draws))
        if backward:
            adapter.require_grad()
            adapter.draws += 1
    segments.append(Segment(total - rows, None))
    return MicroBatch(
        pieces=pieces,
        starts=starts,
        lengths=lengths,
        tokens_T=_stream([datum.tokens for datum in data], total, device),
        positions_T=_stream([np.arange(n) for n in lengths], total, device),
        targets_T=_stream([datum.loss_inputs["target_tokens"] for datum in data], total, device),
        inputs={name: _stream(values, total, device) for name, values in columns.items()},
        losses=_shares(pieces, losses, total, device),
        segments=segments,
    )


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
        shares.append(LossShare(*loss, _stream(flags, total, device)))
    return shares
