"""A loop in plain PyTorch adds each segment's own A·B to a shared base product.

T tokens of the stream, t tokens of one segment, K input features, N output features, R rank
(summed over the members of an input group).

For a segment with input x, and each member j of the group (q, k, v of a layer, say):

    s = x Aᵀ                      one product for all members      [t, R]
    y_j  += scale_j · s_j Bᵀ_j                                     [t, N_j]

and backward, with dy_j given:

    ds_j  = scale_j · dy_j B_j                                     [t, R_j]
    dBᵀ_j += scale_j · s_jᵀ dy_j                                   [R_j, N_j]
    dA    += dsᵀ x                one product for all members      [R, K]
    dx   += ds A                  one product for all members      [t, K]

The caller makes the base's products first (y_j = x W_jᵀ + bias_j, dx = Σ dy_j W_j): a product that
adds takes no longer than one that overwrites, and rows without an adapter need nothing more.

Every product reads rows of one segment only, so its bits do not depend on the neighbours. The
small matrices are kept rank-major (sᵀ and dsᵀ, as A and Bᵀ are): BLAS is up to 1.8 times faster
with the rank as the number of rows of a product than as its number of columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manylora.types.machine import is_intel

CACHE_LINE = 64

# Rows of fewer elements (128 KiB in fp32) are not worth an operation to fetch them.
WORTH_FETCHING = 1 << 15

# On Intel's CPUs the products bring their rows into cache as fast as a sum does.
FETCHING = not is_intel()


@dataclass(slots=True)
class SiteFactor:
    """A `SiteFactor` is one site's B in a block; it adds to the group's output number `output`."""

    output: int
    rank: int
    scale: float
    bt_RN: Tensor
    grad_bt_RN: Tensor | None = None


@dataclass(slots=True)
class Block:
    """A block is one adapter's factors for one input group: views of the adapter's vectors.

    `scale` is that of all members, None if they differ.
    """

    a_RK: Tensor
    members: tuple[SiteFactor, ...]
    ranks: list[int]
    grad_a_RK: Tensor | None = None
    scale: float | None = field(init=False)

    def __post_init__(self) -> None:
        scales = {member.scale for member in self.members}
        self.scale = scales.pop() if len(scales) == 1 else None


@dataclass(frozen=True, slots=True)
class Columns:
    """`Columns` say where an input's columns lie in the whole of `total`; others have the rest."""

    start: int
    total: int


@dataclass(slots=True)
class SegmentWork:
    """A `SegmentWork` is a block applied to one segment.

    `segment` is the segment's number in the split of the stream; `seed` fixes the dropout mask.
    """

    segment: int
    block: Block
    dropout: float = 0.0
    seed: int = 0


def shrink_expand(
    x_TK: Tensor,
    ys: Sequence[Tensor],
    sizes: list[int],
    work: Sequence[SegmentWork],
    columns: Columns | None = None,
) -> list[Tensor]:
    """Add the low-rank term of every row to `ys`.

    Args:
        x_TK: the group's shared input.
        ys: for each member of the group the base's output [T, N_j].
        sizes: rows of each segment; they add up to T.
        work: the segments that have an adapter on this group.
        columns: None if x is the whole input. Dropout masks are drawn for the whole one.

    Returns:
        sᵀ [R, t] of each item of `work`, which the backward needs.
    """
    xs = _segments(x_TK, sizes)
    y_parts = [y.split_with_sizes(sizes) for y in ys]
    shrunk = []
    for item in work:
        block, segment = item.block, item.segment
        s_Rt = _matmul(block.a_RK, _dropped(xs[segment], item, columns).t())
        shrunk.append(s_Rt)
        for member, s_rt in zip(block.members, _rows(s_Rt, block), strict=True):
            y_tN = y_parts[member.output][segment]
            _fetch(y_tN)
            _add_matmul(y_tN, s_rt.t(), member.bt_RN, member.scale)
    return shrunk


def shrink_expand_backward(
    x_TK: Tensor,
    dys: Sequence[Tensor | None],
    dx_TK: Tensor | None,
    sizes: list[int],
    work: Sequence[SegmentWork],
    shrunk: Sequence[Tensor],
    columns: Columns | None = None,
) -> None:
    """Add to the gradients of every segment's factors, and the low-rank part to the input's.

    Args:
        x_TK: the group's shared input, as in the forward.
        dys: gradient [T, N_j] of each output; None where nothing used the output.
        dx_TK: the base's part of the input's gradient; None if it is not needed.
        sizes: rows of each segment.
        work: the segments that have an adapter on this group.
        columns: None if x is the whole input.
        shrunk: what the forward returned.
    """
    xs = _segments(x_TK, sizes)
    dy_parts = [None if dy is None else _segments(dy, sizes) for dy in dys]
    dx_parts = None if dx_TK is None else dx_TK.split_with_sizes(sizes)
    for item, s_Rt in zip(work, shrunk, strict=True):
        block, segment = item.block, item.segment
        ds_Rt = torch.empty_like(s_Rt)
        rows = zip(block.members, _rows(s_Rt, block), _rows(ds_Rt, block), strict=True)
        for member, s_rt, ds_rt in rows:
            parts = dy_parts[member.output]
            if parts is None:
                ds_rt.zero_()
                continue
            dy_tN = parts[segment]
            _fetch(dy_tN)
            _write_matmul(ds_rt, member.bt_RN, dy_tN.t())
            if block.scale is None:
                ds_rt.mul_(member.scale)
            assert member.grad_bt_RN is not None
            _add_matmul(member.grad_bt_RN, s_rt, dy_tN, member.scale)
        assert block.grad_a_RK is not None
        scale = 1.0 if block.scale is None else block.scale
        _add_matmul(block.grad_a_RK, ds_Rt, _dropped(xs[segment], item, columns), scale)
        if dx_parts is not None:
            _add_input_gradient(dx_parts[segment], ds_Rt, scale, item, columns)


def _segments(rows_TK: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Return the rows of each segment, to be read only.

    The vendor's products may round otherwise where an operand does not begin on a cache line. If
    rows are no whole number of those, a segment's place in the stream would show in its bits.
    """
    parts = rows_TK.split_with_sizes(sizes)
    if rows_TK.device.type == "cpu" and rows_TK.shape[1] * rows_TK.element_size() % CACHE_LINE:
        return [part.clone() for part in parts]
    return parts


def _fetch(rows_tK: Tensor) -> None:
    """Read the rows once, so that they are in cache for the products that follow.

    A product that reads them as columns, or adds to them, is slow to bring them there: a sum and
    then the product take less time than the product alone.
    """
    if FETCHING and rows_tK.is_cpu and rows_tK.numel() >= WORTH_FETCHING:
        rows_tK.sum()


def _rows(s_Rt: Tensor, block: Block) -> Sequence[Tensor]:
    """Return the rows of each member."""
    return (s_Rt,) if len(block.ranks) == 1 else s_Rt.split_with_sizes(block.ranks)


def _add_input_gradient(
    dx_tK: Tensor, ds_Rt: Tensor, scale: float, item: SegmentWork, columns: Columns | None
) -> None:
    if item.dropout > 0.0:
        term_tK = _matmul(ds_Rt.t(), item.block.a_RK).mul_(_keep_mask(dx_tK, item, columns))
        dx_tK.add_(term_tK, alpha=scale)
    else:
        _fetch(dx_tK)
        _add_matmul(dx_tK, ds_Rt.t(), item.block.a_RK, scale)


def _dropped(x_tK: Tensor, item: SegmentWork, columns: Columns | None) -> Tensor:
    return x_tK if item.dropout == 0.0 else x_tK * _keep_mask(x_tK, item, columns)


def _keep_mask(x_tK: Tensor, item: SegmentWork, columns: Columns | None) -> Tensor:
    """Make 0 or 1/(1-p) for each element, anew in the backward rather than stored."""
    keep = 1.0 - item.dropout
    generator = torch.Generator(x_tK.device).manual_seed(item.seed)
    if columns is None:
        return torch.empty_like(x_tK).bernoulli_(keep, generator=generator).div_(keep)
    whole = x_tK.new_empty(len(x_tK), columns.total).bernoulli_(keep, generator=generator)
    return whole[:, columns.start : columns.start + x_tK.shape[1]].div_(keep)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the wider of the two dtypes."""
    if a.dtype == b.dtype:
        return a @ b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_matmul(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """Add alpha · a @ b to `out`, in one pass where the dtypes allow it."""
    if out.dtype == a.dtype == b.dtype:
        out.addmm_(a, b, alpha=alpha)
    else:
        out.add_(_matmul(a, b), alpha=alpha)


def _write_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b to `out`."""
    if out.dtype == a.dtype == b.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(_matmul(a, b))
