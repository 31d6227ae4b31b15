"""A micro-batch is one packed stream with all that its forward, loss and backward need.

T tokens of the stream, padding rows at its end included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manylora.engine.head_rows import HeadRows, head_rows
from manylora.engine.plan import FrozenWeights, Piece
from manylora.lora.adapter import Adapter, AdapterWeights
from manylora.lora.routing import Segment
from manylora.losses import Loss, Settings
from manylora.models.stream import padded_rows
from manylora.types.data import Array


@dataclass(slots=True)
class MicroBatch:
    """A `MicroBatch` is a packed stream.

    Attributes:
        pieces: in stream order.
        starts: first row of each piece.
        lengths: tokens of each sequence.
        tokens_T, positions_T: int64 [T].
        segments: one per piece, and one for the padding.
        head: the rows that the head runs on, with what their losses need.
    """

    pieces: Sequence[Piece]
    starts: list[int]
    lengths: list[int]
    tokens_T: Tensor
    positions_T: Tensor
    segments: list[Segment]
    head: HeadRows

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
    snapshots: Mapping[str, AdapterWeights] | None = None,
) -> MicroBatch:
    """Lay pieces end to end. Without any, the stream is padding alone.

    Args:
        adapters: those that have pieces.
        losses: of each operation, by the pieces' `work`.
        backward: whether the adapters need a gradient to add to.
        snapshots: those that have pieces.
    """
    data = [datum for piece in pieces for datum in piece.data]
    lengths = [len(datum) for datum in data]
    rows = sum(lengths)
    total = padded_rows(max(rows, 1))
    starts = np.cumsum([0, *(piece.rows for piece in pieces)])[:-1].tolist()
    segments = []
    for piece in pieces:
        if isinstance(piece.whose, FrozenWeights):
            name = piece.whose.snapshot
            weights = None if name is None else (snapshots or {})[name]
            segments.append(Segment(piece.rows, weights))
            continue
        adapter = adapters[piece.whose]
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
        segments=segments,
        head=head_rows(pieces, starts, losses, device),
    )


def _tokens(parts: Sequence[Array], total: int, device: torch.device) -> Tensor:
    """Join the parts end to end, with zeros up to `total`."""
    row = np.zeros(total, np.int64)
    end = 0
    for part in parts:
        row[end : end + len(part)] = part
        end += len(part)
    return torch.from_numpy(row).to(device, non_blocking=True)
