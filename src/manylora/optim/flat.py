"""Adapters that step together on a mesh share one pass over their gradients.

The number of collectives does not depend on the number of adapters: each sends a flat buffer in
which the adapters lie end to end. Along dp each rank gets one slice of every gradient, and adds
up its shares in their own order; along tp the terms of the factors that are whole on every rank
are added up, each slice by itself, so that fewer bytes are sent than if the slices came last.

n adapters, L numbers of one adapter's vector on this rank, C of one dp slice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.optim.adamw import gradient_norms
from manylora.parallel import Axis, Mesh


@dataclass(slots=True)
class PendingStep:
    """A `PendingStep` is one adapter's gradient on this rank, and says how to add it up.

    Attributes:
        grad_L: fp32; None where this rank has no term of it.
        length: L.
        slice_size: C.
        ranks: the dp ranks that hold its shares, in the order of the shares.
        num_whole: numbers at the front of which every tp rank has a term.
        repeated: ranges of these that are complete on every tp rank.
    """

    grad_L: Tensor | None
    length: int
    slice_size: int
    ranks: Sequence[int]
    num_whole: int
    repeated: Sequence[tuple[int, int]] = ()


def reduced(due: Sequence[PendingStep], mesh: Mesh, device: torch.device) -> list[Tensor]:
    """Return this rank's dp slice of each adapter's summed gradient: fp32, [C] or less at the end.

    With one dp rank these are the gradients themselves, changed in place.
    """
    slices = _exchanged(due, mesh.dp, device)
    if mesh.tp.size == 1:
        return slices
    fronts = []
    for pending, slice_C in zip(due, slices, strict=True):
        start = mesh.dp.index * pending.slice_size
        fronts.append(slice_C[: _front(pending, start, slice_C)])
        if mesh.tp.index != 0:
            for first, last in pending.repeated:
                slice_C[max(first - start, 0) : max(last - start, 0)] = 0.0
    flat = mesh.tp.sum_(torch.cat(fronts))
    for front, summed in zip(fronts, flat.split([len(f) for f in fronts]), strict=True):
        front.copy_(summed)
    return slices


def norms(due: Sequence[PendingStep], slices: Sequence[Tensor], mesh: Mesh) -> Iterable[float]:
    """Return each summed gradient's L2 norm, the same on every rank; every number counts once."""
    if mesh.world.size == 1:
        return gradient_norms(slices)
    parts = []
    for pending, slice_C in zip(due, slices, strict=True):
        start = mesh.dp.index * pending.slice_size
        skipped = _front(pending, start, slice_C) if mesh.tp.index != 0 else 0
        # In fp64, since the terms come in other parts on every mesh.
        parts.append(torch.linalg.vector_norm(slice_C[skipped:], dtype=torch.float64))
    squares_n = torch.stack(parts).square_()
    # What overflows in one process overflows here.
    return mesh.world.sum_(squares_n).float().sqrt().tolist()


def publish(
    masters: Sequence[Tensor], living: Sequence[Tensor], sizes: Sequence[int], axis: Axis
) -> None:
    """Let every rank have all slices of the new weights, in the dtype that layers read.

    Args:
        masters: this rank's slice of each adapter, fp32.
        living: what the layers read, [L] each; filled.
        sizes: C of each.
    """
    # The wider dtypes first: a view of bytes as wider numbers has to begin at a multiple of theirs.
    order = sorted(range(len(living)), key=lambda i: -living[i].element_size())
    parts = []
    for i in order:
        own_C = living[i].new_zeros(sizes[i])
        own_C[: len(masters[i])] = masters[i]
        parts.append(own_C.view(torch.uint8))
    # Every rank's bytes have to begin there, too.
    parts.append(parts[0].new_zeros(-sum(map(len, parts)) % 8))
    everything = axis.gather(torch.cat(parts))
    start = 0
    for i in order:
        size = sizes[i]
        stop = start + size * living[i].element_size()
        for rank in range(axis.size):
            part_C = everything[rank, start:stop].view(living[i].dtype)
            own_C = living[i][rank * size : (rank + 1) * size]
            own_C.copy_(part_C[: len(own_C)])
        start = stop


def _exchanged(due: Sequence[PendingStep], axis: Axis, device: torch.device) -> list[Tensor]:
    """Return this rank's slice of every gradient, summed over dp."""
    if axis.size == 1:
        return [_grad(pending, device) for pending in due]
    sizes = [pending.slice_size for pending in due]
    sent = torch.zeros(axis.size, sum(sizes), device=device)
    for pending, columns in zip(due, sent.split(sizes, dim=1), strict=True):
        if pending.grad_L is None:
            continue
        for row_C, part_C in zip(columns, pending.grad_L.split(columns.shape[1]), strict=False):
            row_C[: len(part_C)] = part_C
    received = axis.exchange(sent)
    slices = []
    for pending, columns in zip(due, received.split(sizes, dim=1), strict=True):
        size = columns.shape[1]
        own = min(max(pending.length - axis.index * size, 0), size)
        if not pending.ranks:
            slices.append(torch.zeros(own, device=device))
            continue
        total_C = columns[pending.ranks[0], :own].clone()
        for rank in pending.ranks[1:]:
            total_C += columns[rank, :own]
        slices.append(total_C)
    return slices


def _grad(pending: PendingStep, device: torch.device) -> Tensor:
    if pending.grad_L is None:
        return torch.zeros(pending.length, device=device)
    return pending.grad_L


def _front(pending: PendingStep, start: int, slice_C: Tensor) -> int:
    """Count the numbers of a slice, which begins at `start`, that every tp rank has a term of."""
    return min(max(pending.num_whole - start, 0), len(slice_C))
