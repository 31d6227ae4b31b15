"""Products in blocks are the products; which way is taken follows from what the CPU does."""

import logging

import pytest
import torch

from manylora.kernels import add_product, frozen, product, write_product

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def choose(monkeypatch: pytest.MonkeyPatch, safe: int | None) -> None:
    monkeypatch.setattr(frozen, "_safe_rows", lambda dtype, threads: safe)


@pytest.fixture(params=[16, 64, None], ids=["whole", "filled up", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, request.param)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [0, 1, 16, 127, 128, 129, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_every_way_gives_the_product(rows: int, dtype: torch.dtype, tolerance: float):
    generator = torch.Generator().manual_seed(rows)
    a_TK, b_KN, bias_N, out_TN = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, 40), (40, 24), (24,), (rows, 24))
    )
    expected = a_TK.double() @ b_KN.double()
    assert product(a_TK, b_KN).dtype == dtype
    if rows == 0:
        assert product(a_TK, b_KN).shape == (0, 24)
        return
    assert relative(product(a_TK, b_KN), expected) < tolerance
    assert relative(product(a_TK, b_KN, bias_N), expected + bias_N.double()) < tolerance
    before = out_TN.double()
    add_product(out_TN, a_TK, b_KN)
    assert relative(out_TN, before + expected) < tolerance
    write_product(out_TN, a_TK, b_KN.t().contiguous().t(), bias_N)
    assert relative(out_TN, expected + bias_N.double()) < tolerance


@pytest.mark.parametrize(
    ("safe", "rows", "sizes"),
    [
        (16, 16, [16]),
        (16, 300, [300]),
        (64, 16, [64]),
        (64, 64, [64]),
        (64, 80, [80]),
        (None, 16, [128]),
        (None, 300, [128, 128, 128]),
    ],
)
def test_which_sizes_are_computed(
    safe: int | None, rows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
):
    """In blocks all are of one size: that makes a row's bits its own, whatever the library does."""
    choose(monkeypatch, safe)
    seen: list[int] = []
    real = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.append(len(a))
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    product(torch.randn(rows, 8), torch.randn(8, 4))
    assert seen == sizes


@pytest.mark.parametrize(
    ("differ", "safe"),
    [
        ((), 16),
        ((16,), 32),
        ((16, 32), 64),
        ((32,), 64),
        ((512,), 16),
        ((16, 512), None),
        ((64,), 128),
        ((64, 128), None),
    ],
)
def test_a_library_that_looks_at_the_number_of_rows_is_found_out(
    differ: tuple[int, ...],
    safe: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """One whose products of some sizes are a little different. 512 is looked at only where smaller
    ones differ, too: so it was wherever we looked."""
    real = torch.Tensor.__matmul__

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = real(a, b)
        return y * (1 + 1e-6) if len(a) in differ and a.shape[1] == 1024 else y

    monkeypatch.setattr(frozen, "_safe_rows", frozen._safe_rows.__wrapped__)
    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    with caplog.at_level(logging.INFO, "manylora.kernels"):
        assert frozen._safe_rows(torch.float32, 1) == safe
    assert frozen.whole_products(torch.device("cpu"), torch.float32) == (safe == 16)
    assert frozen.whole_products(torch.device("meta"), torch.float32)
    if safe is None:
        assert "blocks of 128 rows" in caplog.text and "MKL_CBWR=AUTO,STRICT" in caplog.text
    elif safe > 16:
        assert f"filled up to {safe} rows" in caplog.text and "MKL" not in caplog.text
    else:
        assert not caplog.records
