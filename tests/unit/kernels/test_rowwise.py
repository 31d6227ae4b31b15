"""Low-rank terms of single rows: those of the segments, and a row's bits are its own."""

import pytest
import torch
from torch import Tensor

from manylora.kernels import (
    Block,
    SegmentWork,
    SiteFactor,
    add_by_row,
    row_batches,
    rowwise,
    shrink_expand,
)
from manylora.kernels.row_counts import some_rows

pytestmark = pytest.mark.usefixtures("threads")
FP32, BF16 = torch.float32, torch.bfloat16


def block_of(terms: int, ranks: list[int], columns: list[int], dtype: torch.dtype) -> Block:
    members = tuple(
        SiteFactor(number, rank, 0.5 + number, some_rows(rank, width, dtype) * 0.1)
        for number, (rank, width) in enumerate(zip(ranks, columns, strict=True))
    )
    return Block(some_rows(sum(ranks), terms, dtype) * 0.1, members, ranks)


def added(x_TK: Tensor, ys: list[Tensor], sizes: list[int], work: list[SegmentWork]):
    ys = [y_TN.clone() for y_TN in ys]
    add_by_row(x_TK, ys, row_batches(x_TK, ys, sizes, work))
    return ys


CASES = [
    (576, [8, 8, 8], [576, 192, 192]),
    (1536, [32], [576]),
    (100, [3, 5], [36, 20]),
    (17, [1], [5]),
]


@pytest.fixture(params=[True, False, None], ids=["batched", "one by one", "as found"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool | None:
    if request.param is not None:
        monkeypatch.setattr(rowwise, "_batched_is_safe", lambda *_: request.param)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "factors"), [(FP32, FP32), (BF16, BF16), (FP32, BF16)])
@pytest.mark.parametrize(("terms", "ranks", "columns"), CASES)
def test_it_adds_what_the_segments_add(terms: int, ranks, columns, dtype, factors):
    work = [
        SegmentWork(0, block_of(terms, ranks, columns, factors)),
        SegmentWork(2, block_of(terms, ranks[::-1], columns, factors)),
    ]
    sizes = [3, 2, 20, 1]
    x_TK = some_rows(sum(sizes), terms, dtype)
    ys = [some_rows(sum(sizes), width, dtype) for width in columns]
    found = added(x_TK, ys, sizes, work)
    shrink_expand(x_TK, ys, sizes, work)
    for one, other in zip(found, ys, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < (1e-2 if dtype == BF16 else 1e-6)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("dtype", "factors"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize(("terms", "ranks", "columns"), CASES)
def test_a_rows_bits_are_its_own(threads: int, terms: int, ranks, columns, dtype, factors):
    block = block_of(terms, ranks, columns, factors)
    generator = torch.Generator().manual_seed(3)
    x_TK = torch.randn(21, terms, generator=generator).to(dtype)
    ys = [torch.randn(21, width, generator=generator).to(dtype) for width in columns]
    alone: list[list[Tensor]] = []
    for row in range(21):
        part = slice(row, row + 1)
        own = added(x_TK[part].clone(), [y[part] for y in ys], [1], [SegmentWork(0, block)])
        alone.append(own)
    for first, count in ((0, 21), (1, 2), (4, 3), (3, 17)):
        part = slice(first, first + count)
        # Others before them in the stream, too.
        x = torch.cat([x_TK[:5], x_TK[part]])
        before = [torch.cat([y[:5], y[part]]) for y in ys]
        found = added(x, before, [5, count], [SegmentWork(1, block)])
        for number, y_TN in enumerate(found):
            assert torch.equal(y_TN[:5], ys[number][:5])
            expected = torch.cat([alone[row][number] for row in range(first, first + count)])
            assert torch.equal(y_TN[5:], expected)


def test_a_library_whose_batches_differ_is_found_out(monkeypatch):
    real = torch.bmm

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        return real(a, b) * (1 + 1e-6) if len(a) == 7 else real(a, b)

    arguments = (64, ((0, 4, 64),), (64,), FP32, FP32, torch.get_num_threads())
    assert rowwise._batched_is_safe.__wrapped__(*arguments)
    monkeypatch.setattr(torch, "bmm", bmm)
    assert not rowwise._batched_is_safe.__wrapped__(*arguments)
