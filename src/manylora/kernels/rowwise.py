"""A few rows get their low-rank terms, each row by products of its own.

In a step of decoding an adapter has as many rows as it has sequences just then, and each must get
the bits that it gets alone. A batched product of single rows does that where it treats every row as
it treats one alone, which is tried; elsewhere rows are taken one at a time.

T tokens of the stream, t tokens of one segment, K input features, N output features, R rank (summed
over the members of an input group, r of one).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from manylora.kernels.lowrank import Block, SegmentWork, SiteFactor
from manylora.kernels.row_counts import some_rows

# Rows of one batched product at most: all numbers up to it are tried.
AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class RowBatch:
    """A `RowBatch` is rows [start, stop) of the stream, which one block acts on.

    Attributes:
        a_tKR: the block's A for each row.
        members: of each member the output, its ranks' slice, scale, and Bᵀ [t, r, N] for each row.
        batched: whether one product may take all rows, in the block's own dtype.
    """

    start: int
    stop: int
    block: Block
    a_tKR: Tensor
    members: list[tuple[int, slice, float, Tensor]]
    batched: bool


def row_batches(
    x_TK: Tensor, ys: Sequence[Tensor], sizes: list[int], work: Sequence[SegmentWork]
) -> list[RowBatch]:
    """Plan how to add low-rank terms to `ys`, for all streams of these segments and dtypes."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    batches = []
    for item in work:
        first, last, block = starts[item.segment], starts[item.segment + 1], item.block
        safe = _batched_is_safe(*_shapes(block, x_TK, ys))
        for start in range(first, last, AT_ONCE):
            stop = min(start + AT_ONCE, last)
            a_KR, begin = block.a_RK.t(), 0
            members: list[tuple[int, slice, float, Tensor]] = []
            for member in block.members:
                ranks = slice(begin, begin + member.rank)
                bt_trN = member.bt_RN.expand(stop - start, *member.bt_RN.shape)
                members.append((member.output, ranks, member.scale, bt_trN))
                begin = ranks.stop
            a_tKR = a_KR.expand(stop - start, *a_KR.shape)
            batches.append(RowBatch(start, stop, block, a_tKR, members, safe))
    return batches


def add_by_row(x_TK: Tensor, ys: Sequence[Tensor], batches: Sequence[RowBatch]) -> None:
    """Add every row's low-rank term to `ys`, without dropout; see `lowrank.shrink_expand`."""
    x_T1K, ys_T1N = x_TK.unsqueeze(1), [y_TN.unsqueeze(1) for y_TN in ys]
    for batch in batches:
        start, stop, a_tKR = batch.start, batch.stop, batch.a_tKR
        if not batch.batched:
            _add_one_by_one(x_TK, ys, range(start, stop), batch.block)
        elif a_tKR.dtype != x_TK.dtype:
            _add_batched(x_TK[start:stop], [y_TN[start:stop] for y_TN in ys], batch.block)
        else:
            s_t1R = torch.bmm(x_T1K[start:stop], a_tKR)
            for output, ranks, scale, bt_trN in batch.members:
                s_t1r = s_t1R if len(batch.members) == 1 else s_t1R[:, :, ranks]
                ys_T1N[output][start:stop].baddbmm_(s_t1r, bt_trN, alpha=scale)


def _add_batched(x_tK: Tensor, ys: Sequence[Tensor], block: Block) -> None:
    count, dtype = len(x_tK), torch.promote_types(x_tK.dtype, block.a_RK.dtype)
    a_KR = block.a_RK.to(dtype).t()
    s_t1R = torch.bmm(x_tK.to(dtype).unsqueeze(1), a_KR.expand(count, *a_KR.shape))
    parts = (s_t1R,) if len(block.ranks) == 1 else s_t1R.split_with_sizes(block.ranks, dim=2)
    for member, s_t1r in zip(block.members, parts, strict=True):
        y_tN, bt_rN = ys[member.output], member.bt_RN.to(dtype)
        bt_trN = bt_rN.expand(count, *bt_rN.shape)
        if y_tN.dtype == dtype:
            y_tN.unsqueeze(1).baddbmm_(s_t1r, bt_trN, alpha=member.scale)
        else:
            y_tN.add_(torch.bmm(s_t1r, bt_trN).squeeze(1), alpha=member.scale)


def _add_one_by_one(x_TK: Tensor, ys: Sequence[Tensor], rows: range, block: Block) -> None:
    """Add each row in tensors of its own, which begin on a cache line wherever the row lies."""
    for row in rows:
        own = [y_TN[row : row + 1].clone() for y_TN in ys]
        _add_batched(x_TK[row : row + 1].clone(), own, block)
        for y_TN, y_1N in zip(ys, own, strict=True):
            y_TN[row : row + 1] = y_1N


Shapes = tuple[
    int, tuple[tuple[int, int, int], ...], tuple[int, ...], torch.dtype, torch.dtype, int
]


def _shapes(block: Block, x_TK: Tensor, ys: Sequence[Tensor]) -> Shapes:
    members = tuple((member.output, member.rank, member.bt_RN.shape[1]) for member in block.members)
    widths = tuple(y_TN.shape[1] for y_TN in ys)
    threads = torch.get_num_threads() if x_TK.is_cpu else 0
    return (x_TK.shape[1], members, widths, x_TK.dtype, block.a_RK.dtype, threads)


@cache
def _batched_is_safe(
    terms: int,
    members: tuple[tuple[int, int, int], ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    factors: torch.dtype,
    threads: int,
) -> bool:
    """Return whether rows of a batched product have the bits of rows alone, however many.

    Args:
        members: output, rank and columns of each.
        widths: columns of each output.
        threads: 0 on a device where no bits are promised.
    """
    if not threads:
        return True
    ranks = [rank for _, rank, _ in members]
    block = Block(
        some_rows(sum(ranks), terms, factors),
        tuple(
            SiteFactor(output, rank, 0.75, some_rows(rank, columns, factors))
            for output, rank, columns in members
        ),
        ranks,
    )
    x_TK = some_rows(AT_ONCE, terms, dtype)
    before = [some_rows(AT_ONCE, width, dtype) for width in widths]
    alone = [y_TN.clone() for y_TN in before]
    _add_one_by_one(x_TK, alone, range(AT_ONCE), block)
    for count in range(1, AT_ONCE + 1):
        part = slice(AT_ONCE - count, AT_ONCE)
        ys = [y_TN[part].clone() for y_TN in before]
        _add_batched(x_TK[part].clone(), ys, block)
        if not all(torch.equal(y, own[part]) for y, own in zip(ys, alone, strict=True)):
            return False
    return True
