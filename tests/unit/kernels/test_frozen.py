"""Products in blocks are the products; which way is taken follows from what the CPU does."""

import logging

import pytest
import torch

from manylora.kernels import add_product, frozen, product, write_product

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.fixture(params=["whole", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    whole = request.param == "whole"
    monkeypatch.setattr(frozen, "_rows_keep_their_bits", lambda dtype, threads: whole)
    return request.param


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


def test_blocks_are_all_of_one_size(monkeypatch: pytest.MonkeyPatch):
    """That is what makes a row's bits its own, whatever the library does."""
    monkeypatch.setattr(frozen, "_rows_keep_their_bits", lambda dtype, threads: False)
    seen: list[int] = []
    real = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.append(len(a))
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    product(torch.randn(300, 8), torch.randn(8, 4))
    assert seen == [128, 128, 128]


def test_a_library_that_looks_at_the_number_of_rows_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """One whose sums of few rows are a little different, in large products only."""
    real = torch.Tensor.__matmul__

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = real(a, b)
        return y * (1 + 1e-6) if len(a) == 64 and a.shape[1] == 1024 else y

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    frozen._rows_keep_their_bits.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "manylora.kernels"):
            assert not frozen.whole_products(torch.device("cpu"), torch.float32)
        assert "float32" in caplog.text and "MKL_CBWR=AUTO,STRICT" in caplog.text
        assert frozen.whole_products(torch.device("meta"), torch.float32)
    finally:
        frozen._rows_keep_their_bits.cache_clear()
