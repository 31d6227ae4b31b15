"""The low-rank op against a dense loop over segments, in all mixtures of dtypes.

T tokens of the stream, t tokens of one segment, K input features, N output features, R rank.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.kernels import Block, SegmentWork, SiteFactor, shrink_expand, shrink_expand_backward

K, SIZES, WIDTHS = 24, [5, 0, 7, 1, 3], [16, 9, 20]
T = sum(SIZES)
# Segment → (rank, scale) of each output that its adapter acts on. Segment 2 is the bare base.
ADAPTERS = {
    0: {0: (3, 0.5), 2: (4, 2.0)},
    1: {1: (2, 1.0)},
    3: {0: (1, 3.0), 1: (5, 0.25), 2: (2, 1.5)},
    4: {0: (2, 0.5), 1: (9, 0.5)},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def block(outputs: dict[int, tuple[int, float]], dtype: torch.dtype, seed: int) -> Block:
    generator = torch.Generator().manual_seed(seed)
    ranks = [rank for rank, _ in outputs.values()]
    a_RK = torch.randn(sum(ranks), K, generator=generator).to(dtype)
    members = []
    for output, (rank, scale) in outputs.items():
        bt_RN = torch.randn(rank, WIDTHS[output], generator=generator).to(dtype)
        grad = torch.zeros(rank, WIDTHS[output])
        members.append(SiteFactor(output, rank, scale, bt_RN, grad))
    return Block(a_RK, tuple(members), ranks, torch.zeros(sum(ranks), K))


def all_work(dtype: torch.dtype, dropout: float = 0.0) -> list[SegmentWork]:
    return [SegmentWork(n, block(o, dtype, n), dropout, 100 + n) for n, o in ADAPTERS.items()]


def stream(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    x_TK = torch.randn(T, K, generator=generator).to(dtype)
    ys = [torch.randn(T, n, generator=generator).to(dtype) for n in WIDTHS]
    dys = [torch.randn(T, n, generator=generator).to(dtype) for n in WIDTHS]
    return x_TK, ys, dys


class Dense:
    """The same by autograd in float64: y_j += scale · x Aᵀ Bᵀ for every row, one at a time."""

    def __init__(self, x_TK: Tensor, work: list[SegmentWork], dys: list[Tensor | None]):
        self.x_TK = x_TK.double().requires_grad_()
        self.deltas = [torch.zeros(T, n, dtype=torch.float64) for n in WIDTHS]
        starts = [0, *itertools.accumulate(SIZES)]
        self.leaves: list[tuple[Tensor, list[Tensor]]] = []
        for item in work:
            rows = slice(starts[item.segment], starts[item.segment + 1])
            a_RK = item.block.a_RK.double().requires_grad_()
            bts = [m.bt_RN.double().requires_grad_() for m in item.block.members]
            self.leaves.append((a_RK, bts))
            first = 0
            for member, bt_RN in zip(item.block.members, bts, strict=True):
                part = a_RK[first : first + member.rank]
                first += member.rank
                delta = member.scale * (self.x_TK[rows] @ part.t()) @ bt_RN
                self.deltas[member.output] = self.deltas[member.output].index_add(
                    0, torch.arange(T)[rows], delta
                )
        pairs = [(d, dy.double()) for d, dy in zip(self.deltas, dys, strict=True) if dy is not None]
        torch.stack([(d * dy).sum() for d, dy in pairs]).sum().backward()


def tolerance(*dtypes: torch.dtype) -> dict[str, Any]:
    """Of the narrowest dtype in play, relative to sums of some twenty products."""
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return {"rtol": 20 * eps, "atol": 60 * eps}


@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("adapter", DTYPES)
def test_forward_and_backward(base: torch.dtype, adapter: torch.dtype):
    x_TK, ys, dys = stream(base)
    work = all_work(adapter)
    dense = Dense(x_TK, work, list(dys))
    for y in ys:
        y.copy_(torch.linspace(-1, 1, y.shape[1]))
    before = [y.double() for y in ys]
    shrunk = shrink_expand(x_TK, ys, SIZES, work)
    close = tolerance(base, adapter)
    for y, start, delta in zip(ys, before, dense.deltas, strict=True):
        torch.testing.assert_close(y.double(), start + delta.detach(), **close)
    assert torch.equal(
        ys[0][5:12].double(), before[0][5:12]
    )  # the bare base's rows stay as they are

    dx_TK = torch.ones((T, K), dtype=base)
    shrink_expand_backward(x_TK, dys, dx_TK, SIZES, work, shrunk)
    assert dense.x_TK.grad is not None
    torch.testing.assert_close(dx_TK.double(), 1.0 + dense.x_TK.grad, **close)
    assert_gradients(work, dense, close)


def assert_gradients(work: list[SegmentWork], dense: Dense, close: dict[str, Any]) -> None:
    for item, (a_RK, bts) in zip(work, dense.leaves, strict=True):
        expected = torch.zeros_like(a_RK) if a_RK.grad is None else a_RK.grad
        assert item.block.grad_a_RK is not None
        torch.testing.assert_close(item.block.grad_a_RK.double(), expected, **close)
        for member, bt_RN in zip(item.block.members, bts, strict=True):
            assert member.grad_bt_RN is not None
            wanted = torch.zeros_like(bt_RN) if bt_RN.grad is None else bt_RN.grad
            torch.testing.assert_close(member.grad_bt_RN.double(), wanted, **close)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_an_output_that_nothing_used(missing: int):
    x_TK, ys, dys = stream(torch.float32)
    given: list[Tensor | None] = [None if i == missing else dy for i, dy in enumerate(dys)]
    work = all_work(torch.float32)
    dense = Dense(x_TK, work, given)
    shrunk = shrink_expand(x_TK, ys, SIZES, work)
    dx_TK = torch.zeros(T, K)
    shrink_expand_backward(x_TK, given, dx_TK, SIZES, work, shrunk)
    assert dense.x_TK.grad is not None
    torch.testing.assert_close(dx_TK.double(), dense.x_TK.grad, rtol=1e-5, atol=1e-4)
    assert_gradients(work, dense, {"rtol": 1e-5, "atol": 1e-4})


def test_gradients_add_up_and_the_inputs_may_be_unwanted():
    x_TK, ys, dys = stream(torch.float32)
    work = all_work(torch.float32)
    shrunk = shrink_expand(x_TK, ys, SIZES, work)
    shrink_expand_backward(x_TK, dys, None, SIZES, work, shrunk)
    once = [item.block.grad_a_RK.clone() for item in work if item.block.grad_a_RK is not None]
    shrink_expand_backward(x_TK, dys, None, SIZES, work, shrunk)
    for item, first in zip(work, once, strict=True):
        torch.testing.assert_close(item.block.grad_a_RK, 2 * first)


def one_segment(rows: int, features: int, dropout: float, seed: int) -> tuple[Tensor, SegmentWork]:
    """A = identity, so that y shows the dropped input itself."""
    eye = torch.eye(features)
    member = SiteFactor(0, features, 1.0, eye, torch.zeros(features, features))
    item = SegmentWork(0, Block(eye, (member,), [features], torch.zeros_like(eye)), dropout, seed)
    return torch.ones(rows, features), item


def test_dropout_keeps_the_mean_and_the_rate():
    x_TK, item = one_segment(4000, 16, 0.3, 5)
    y_TN = torch.zeros_like(x_TK)
    shrink_expand(x_TK, [y_TN], [4000], [item])
    assert set(y_TN.unique().tolist()) == {0.0, float(torch.ones(1).div_(0.7))}
    kept = float((y_TN > 0).float().mean())
    assert kept == pytest.approx(0.7, abs=0.01)  # five standard deviations
    assert float(y_TN.mean()) == pytest.approx(1.0, abs=0.015)


def test_the_backward_sees_the_forwards_mask():
    """With A and B the identity and dy = 1, dx is the mask, and dB's columns are its sums."""
    x_TK, item = one_segment(50, 16, 0.4, 5)
    y_TN, dx_TK = torch.zeros_like(x_TK), torch.zeros_like(x_TK)
    shrunk = shrink_expand(x_TK, [y_TN], [50], [item])
    shrink_expand_backward(x_TK, [torch.ones_like(x_TK)], dx_TK, [50], [item], shrunk)
    assert torch.equal(dx_TK, y_TN)
    assert item.block.grad_a_RK is not None
    torch.testing.assert_close(item.block.grad_a_RK, y_TN.sum(0).expand(16, 16))


def test_masks_differ_by_seed_only():
    masks = []
    for seed in (1, 1, 2):
        x_TK, item = one_segment(20, 16, 0.5, seed)
        y_TN = torch.zeros_like(x_TK)
        shrink_expand(x_TK, [y_TN], [20], [item])
        masks.append(y_TN)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("features", [24, 25])
def test_a_segments_bits_do_not_depend_on_its_place(features: int):
    """Also where its rows do not begin on a cache line."""
    generator = torch.Generator().manual_seed(0)
    rows_TK = torch.randn(9, features, generator=generator)
    found = []
    for before in (0, 1, 5):
        padded_TK = torch.cat([torch.randn(before, features), rows_TK])
        a_RK = torch.randn(3, features, generator=torch.Generator().manual_seed(1))
        bt_RN = torch.randn(3, features, generator=torch.Generator().manual_seed(2))
        member = SiteFactor(0, 3, 2.0, bt_RN, torch.zeros_like(bt_RN))
        item = SegmentWork(1, Block(a_RK, (member,), [3], torch.zeros_like(a_RK)))
        y_TN, dx_TK = torch.zeros_like(padded_TK), torch.zeros_like(padded_TK)
        shrunk = shrink_expand(padded_TK, [y_TN], [before, 9], [item])
        shrink_expand_backward(padded_TK, [padded_TK], dx_TK, [before, 9], [item], shrunk)
        assert item.block.grad_a_RK is not None and member.grad_bt_RN is not None
        found.append((y_TN[before:], dx_TK[before:], item.block.grad_a_RK, member.grad_bt_RN))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
