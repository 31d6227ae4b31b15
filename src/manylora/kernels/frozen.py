"""A row of a product with frozen weights has the same bits, however many rows there are.

A CPU's vendor library picks its kernel, and the order in which it adds, by the size of the whole
product; so what one tenant's row becomes may depend on how many rows its neighbours have. Whether
it does is found out by trying. If only products of few rows differ, they are filled up with zeros;
otherwise products are made in blocks of one size, which are all computed alike. (Intel's library
needs neither if it is asked before its first product: `manylora.__init__` asks.)

T rows, K terms of each sum, N columns.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from manylora.kernels.row_counts import alike, some_rows

log = logging.getLogger("manylora.kernels")

PRODUCTS_ADVICE = "import manylora before anything is computed, or set MKL_CBWR=AUTO,STRICT"

# Rows of a block. With fewer the products take longer, with more a short stream is padded further.
BLOCK_ROWS = 128

# Rows of every product are a multiple of this (see `models.stream`).
FEWEST_ROWS = 16

# Products (K, N) that are tried. Wherever we saw rows that depend on their number, some of these
# did, and among products of up to the first number of rows already.
TRIED_SIZES = ((512, 1024), (1024, 1024), (256, 128))
TRIED_ROWS = (256, 1024)

# Numbers of rows of a base's own products are tried as far as that takes so many multiplications.
TRIED_WORK = 4_000_000_000


def product(a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return a · b, plus a bias for each column, as a new [T, N]."""
    out_TN = a_TK.new_empty(len(a_TK), b_KN.shape[1])
    write_product(out_TN, a_TK, b_KN, bias_N)
    return out_TN


def write_product(out_TN: Tensor, a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> None:
    """Write a · b, plus a bias for each column, to `out`."""
    if bias_N is None:
        _run(lambda rows_tK, out_tN: torch.mm(rows_tK, b_KN, out=out_tN), a_TK, out_TN)
    else:
        _run(lambda rows_tK, out_tN: torch.addmm(bias_N, rows_tK, b_KN, out=out_tN), a_TK, out_TN)


def add_product(out_TN: Tensor, a_TK: Tensor, b_KN: Tensor) -> None:
    """Add a · b to `out`."""
    _run(lambda rows_tK, out_tN: out_tN.addmm_(rows_tK, b_KN), a_TK, out_TN)


def whole_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether rows keep their bits in this process when products are made as they come."""
    # On other devices no bits are promised.
    return device.type != "cpu" or _safe_rows(dtype, torch.get_num_threads()) == FEWEST_ROWS


@cache
def safe_plain(
    terms: int,
    columns: int,
    dtype: torch.dtype,
    threads: int,
    counts: tuple[int, ...],
    multiple: int,
) -> frozenset[int]:
    """Return those of `counts` of which rows of a product of these sizes surely keep their bits.

    Args:
        threads: torch's number of them, which the answer depends on.
        multiple: rows in multiples of it keep their bits.
    """
    if _safe_rows(dtype, threads) != FEWEST_ROWS:
        return frozenset()  # products of few rows are filled up to some number anyway
    tried: list[int] = []
    rows = 2 * multiple
    for count in counts:
        rows += count
        if rows * terms * columns > TRIED_WORK:
            break
        tried.append(count)
    if not tried:
        return frozenset()
    weight_KN = some_rows(columns, terms, dtype).t()
    most = -(-tried[-1] // multiple) * multiple
    return alike(lambda x_TK: product(x_TK, weight_KN), some_rows(most, terms, dtype), tried)


def _run(multiply: Callable[[Tensor, Tensor], object], a_TK: Tensor, out_TN: Tensor) -> None:
    if whole_products(a_TK.device, a_TK.dtype):
        multiply(a_TK, out_TN)
        return
    safe = _safe_rows(a_TK.dtype, torch.get_num_threads())
    # Products of `safe` rows and more give a row the same bits, so one product of all rows will
    # do; without such a number every product has a block's rows, and so the same kernel.
    block = BLOCK_ROWS if safe is None else max(safe, len(a_TK))
    for start in range(0, len(a_TK), block):
        rows_tK, out_tN = a_TK[start : start + block], out_TN[start : start + block]
        missing = block - len(rows_tK)
        if not missing:
            multiply(rows_tK, out_tN)
            continue
        rows_tK = torch.cat([rows_tK, rows_tK.new_zeros(missing, rows_tK.shape[1])])
        padded_tN = torch.cat([out_tN, out_tN.new_zeros(missing, out_tN.shape[1])])
        multiply(rows_tK, padded_tN)
        out_tN.copy_(padded_tN[: len(out_tN)])


@cache
def _safe_rows(dtype: torch.dtype, threads: int) -> int | None:
    """Return from how many rows on a row has the same bits; None if from more than a block's. The
    answer depends on `threads`, torch's number of them."""
    few, many = TRIED_ROWS
    if _fewest_alike(dtype, few) == FEWEST_ROWS:
        return FEWEST_ROWS
    fewest = _fewest_alike(dtype, many)
    safe = None if fewest is None or fewest > BLOCK_ROWS else fewest
    _say(dtype, threads, safe)
    return safe


def _fewest_alike(dtype: torch.dtype, most: int) -> int | None:
    """Return the fewest rows from which on all tried products give the bits that `most` give."""
    generator = torch.Generator().manual_seed(0)
    counts = [
        most >> shift for shift in range(1, most.bit_length()) if most >> shift >= FEWEST_ROWS
    ]
    for terms, columns in TRIED_SIZES:
        a_TK = torch.randn(most, terms, generator=generator).to(dtype)
        b_NK = torch.randn(columns, terms, generator=generator).to(dtype)
        # A forward reads the weight transposed, a backward as it lies: two kernels.
        for b_KN in (b_NK.t(), b_NK.t().contiguous()):
            whole_TN = a_TK @ b_KN
            for index, rows in enumerate(counts):
                if not torch.equal(a_TK[:rows].clone() @ b_KN, whole_TN[:rows]):
                    del counts[index:]  # nor are fewer of any use
                    break
    return counts[-1] if counts else None


def _say(dtype: torch.dtype, threads: int, safe: int | None) -> None:
    # Half precision is so on some CPUs whatever one does, and filling up costs little.
    bad = dtype == torch.float32 and safe is None
    log.log(
        logging.WARNING if bad else logging.INFO,
        "%s products in %d threads are %s, which takes longer: on this CPU a row's bits would "
        "depend on its neighbours otherwise%s",
        str(dtype).removeprefix("torch."),
        threads,
        f"made in blocks of {BLOCK_ROWS} rows" if safe is None else f"filled up to {safe} rows",
        f"; {PRODUCTS_ADVICE}" if bad else "",
    )
