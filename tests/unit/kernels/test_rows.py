"""Numbers of rows that keep a row's bits: what is tried is found out, and what differs is left."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from manylora.kernels import frozen, prepacked
from manylora.kernels import row_counts as rows
from manylora.kernels.prepacked import PackedWeight, safe_packed
from manylora.kernels.row_counts import RowCounts, alike, ladder, safe_for_functions, some_rows

pytestmark = pytest.mark.usefixtures("threads")

# Those of a base of 135 million parameters, and odd ones.
SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (100, 36), (17, 5)]


def test_a_step_is_filled_up_to_the_next_number():
    counts = RowCounts((1, 2, 4, 6), 16)
    assert [counts.holding(n) for n in (1, 2, 3, 5, 6, 7, 16, 17)] == [1, 2, 4, 6, 6, 16, 16, 32]
    assert RowCounts((), 32).holding(1) == 32


@pytest.mark.parametrize("most", [1, 2, 5, 9, 64, 256, 300])
def test_the_ladder_reaches_its_top_and_wastes_little(most: int):
    counts = ladder(most)
    assert counts[-1] == most and list(counts) == sorted(set(counts))
    holding = RowCounts(counts, 1).holding
    assert all(holding(n) <= max(n + 1, 1.25 * n) for n in range(1, most + 1))
    assert all(holding(n) == n for n in range(1, min(most, 8) + 1))


@pytest.mark.parametrize("differ", [(1,), (1, 2, 3), (4,), (6, 8), (8,)])
def test_numbers_that_give_other_bits_are_found_out(differ: tuple[int, ...]):
    def make(x_TK: Tensor) -> Tensor:
        return x_TK * (1 + 1e-6) if len(x_TK) in differ else x_TK * 1.0

    counts = (1, 2, 3, 4, 6, 8)
    assert alike(make, some_rows(12, 5, torch.float32), counts) == set(counts) - set(differ)


def test_a_row_whose_place_shows_is_found_out():
    def make(x_TK: Tensor) -> Tensor:
        y_TK = x_TK * 1.0
        y_TK[0] *= 1 + 1e-6
        return y_TK

    # Only the whole has the same first row.
    assert alike(make, some_rows(12, 5, torch.float32), (1, 2, 3, 12)) == {12}


@pytest.mark.parametrize(
    ("width", "threads", "counts"),
    [
        (64, 1, {1, 2, 3, 4, 8, 16}),
        (32, 1, {2, 4, 8, 16}),
        (50, 1, set()),
        (8, 1, {8, 16}),
        (49152, 1, {1, 2, 3, 4, 8, 16}),
        (49152, 2, {1, 2, 3, 4, 8, 16}),
        (32832, 2, {2, 4, 8, 16}),
        (32896, 2, {1, 2, 3, 4, 8, 16}),
    ],
)
def test_functions_have_no_ragged_ends(width: int, threads: int, counts: set[int], monkeypatch):
    """Where a thread's share ends within a vector, its last elements go through another kernel."""
    monkeypatch.setattr(rows, "FUNCTIONS", ())
    found = safe_for_functions.__wrapped__(width, torch.float32, threads, (1, 2, 3, 4, 8, 16))
    assert found == counts


def test_a_function_that_looks_at_the_number_of_rows_is_found_out(monkeypatch):
    def odd(x_TN: Tensor) -> Tensor:
        return x_TN * (1 + 1e-6) if len(x_TN) % 2 else x_TN * 1.0

    monkeypatch.setattr(rows, "FUNCTIONS", (*rows.FUNCTIONS, odd))
    counts = (1, 2, 3, 4, 8)
    found = safe_for_functions.__wrapped__(64, torch.float32, torch.get_num_threads(), counts)
    assert found <= {2, 4, 8}


def packs(dtype: torch.dtype) -> bool:
    try:
        PackedWeight(some_rows(8, 8, dtype), None)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("terms", "columns"), SHAPES)
def test_weights_kept_twice_give_the_product(terms: int, columns: int, bias: bool, dtype):
    if not packs(dtype):
        counts = (1, 2, 16)
        threads = torch.get_num_threads()
        assert safe_packed(terms, columns, bias, dtype, threads, counts) == frozenset()
        return
    weight_NK = some_rows(columns, terms, dtype)
    bias_N = some_rows(1, columns, dtype)[0] if bias else None
    packed = PackedWeight(weight_NK, bias_N)
    for count in (1, 3, 40):
        x_TK = some_rows(count, terms, dtype)
        expected = x_TK.double() @ weight_NK.double().t() + (0 if bias_N is None else bias_N)
        found = packed.product(x_TK)
        assert found.dtype == dtype and found.shape == (count, columns)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_found_holds_for_other_rows(threads: int, dtype: torch.dtype):
    """For other values, at other places, than those of the trial."""
    generator = torch.Generator().manual_seed(5)
    counts = ladder(48)
    for terms, columns in SHAPES:
        weight_NK = torch.randn(columns, terms, generator=generator).to(dtype)
        x_TK = torch.randn(96, terms, generator=generator).to(dtype)
        plain = partial(frozen.product, b_KN=weight_NK.t())
        ways: list[tuple[frozenset[int], Callable[[Tensor], Tensor]]] = [
            (frozen.safe_plain(terms, columns, dtype, threads, counts, 32), plain)
        ]
        if packs(dtype):
            product = PackedWeight(weight_NK, None).product
            ways.append((safe_packed(terms, columns, False, dtype, threads, counts), product))
        for safe, make in ways:
            whole_TN = torch.cat([make(x_TK[:48]), make(x_TK[48:])])
            for count in sorted(safe):
                first = 3 * count % (96 - count)
                part = slice(first, first + count)
                if first < 48 < first + count:
                    continue
                assert torch.equal(make(x_TK[part].clone()), whole_TN[part]), (terms, count)


def test_a_library_whose_short_products_differ(monkeypatch):
    real = torch.mm

    def mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        real(a, b, out=out)
        return out.mul_(1 + 1e-6) if len(a) in (1, 2, 3, 5) else out

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(frozen, "_safe_rows", lambda dtype, threads: 16)
    try_plain = frozen.safe_plain.__wrapped__
    threads = torch.get_num_threads()
    found = try_plain(64, 64, torch.float32, threads, (1, 2, 3, 4, 5, 8, 16), 16)
    assert found <= {4, 8, 16} and 16 in found
    # Where products are filled up anyway, and where a trial would take too long, none is known.
    monkeypatch.setattr(frozen, "TRIED_WORK", 1000)
    assert try_plain(64, 64, torch.float32, threads, (1, 16), 16) == frozenset()
    monkeypatch.setattr(frozen, "_safe_rows", lambda dtype, threads: None)
    assert try_plain(8, 8, torch.float32, threads, (1, 16), 16) == frozenset()


def test_a_library_that_has_no_such_products(monkeypatch):
    class Without:
        def __init__(self, *_: object):
            raise RuntimeError("no such primitive")

    monkeypatch.setattr(prepacked, "PackedWeight", Without)
    assert safe_packed.__wrapped__(64, 64, False, torch.float32, 1, (1, 2)) == frozenset()
