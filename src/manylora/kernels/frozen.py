"""Products with frozen weights: a row has the same bits, however many rows there are.

A CPU's vendor library picks its kernel, and the order in which it adds, by the size of the whole
product; so what one tenant's row becomes may depend on how many rows its neighbours have. Where it
does, the product is made in blocks of one size, which are all computed alike. Whether it does is
found out by trying. (Intel's library does not if it is asked before its first product:
`manylora.__init__` asks.)

T rows, K terms of each sum, N columns.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("manylora.kernels")

PRODUCTS_ADVICE = "import manylora before anything is computed, or set MKL_CBWR=AUTO,STRICT"

# Rows of a block. With fewer the products take longer, with more a short stream is padded further.
BLOCK_ROWS = 128

# Products (K, N) that are tried, of how many rows. Wherever we saw rows that depend on their
# number, some of these did.
TRIED_SIZES = ((512, 1024), (1024, 1024), (256, 128))
TRIED_ROWS, ALL_ROWS = (16, 32, 64, 128), 256


def product(a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a · b, plus a bias for each column, as a new [T, N]."""
    out_TN = a_TK.new_empty(len(a_TK), b_KN.shape[1])
    write_product(out_TN, a_TK, b_KN, bias_N)
    return out_TN


def write_product(out_TN: Tensor, a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> None:
    """out = a · b, plus a bias for each column."""
    if bias_N is None:
        _run(lambda rows_tK, out_tN: torch.mm(rows_tK, b_KN, out=out_tN), a_TK, out_TN)
    else:
        _run(lambda rows_tK, out_tN: torch.addmm(bias_N, rows_tK, b_KN, out=out_tN), a_TK, out_TN)


def add_product(out_TN: Tensor, a_TK: Tensor, b_KN: Tensor) -> None:
    """out += a · b."""
    _run(lambda rows_tK, out_tN: out_tN.addmm_(rows_tK, b_KN), a_TK, out_TN)


def whole_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows keep their bits when products are made in one piece, in this process."""
    # On other devices nobody is promised bits.
    return device.type != "cpu" or _rows_keep_their_bits(dtype, torch.get_num_threads())


def _run(multiply: Callable[[Tensor, Tensor], object], a_TK: Tensor, out_TN: Tensor) -> None:
    if whole_products(a_TK.device, a_TK.dtype):
        multiply(a_TK, out_TN)
        return
    for start in range(0, len(a_TK), BLOCK_ROWS):
        rows_tK, out_tN = a_TK[start : start + BLOCK_ROWS], out_TN[start : start + BLOCK_ROWS]
        missing = BLOCK_ROWS - len(rows_tK)
        if not missing:
            multiply(rows_tK, out_tN)
            continue
        rows_tK = torch.cat([rows_tK, rows_tK.new_zeros(missing, rows_tK.shape[1])])
        padded_tN = torch.cat([out_tN, out_tN.new_zeros(missing, out_tN.shape[1])])
        multiply(rows_tK, padded_tN)
        out_tN.copy_(padded_tN[: len(out_tN)])


@cache
def _rows_keep_their_bits(dtype: torch.dtype, threads: int) -> bool:
    """Try it; `threads` is torch's number of them, which the answer depends on."""
    generator = torch.Generator().manual_seed(0)
    for terms, columns in TRIED_SIZES:
        a_TK = torch.randn(ALL_ROWS, terms, generator=generator).to(dtype)
        b_NK = torch.randn(columns, terms, generator=generator).to(dtype)
        for b_KN in (b_NK.t(), b_NK.t().contiguous()):
            whole_TN = a_TK @ b_KN
            for rows in TRIED_ROWS:
                if not torch.equal(a_TK[:rows].clone() @ b_KN, whole_TN[:rows]):
                    _say(dtype, threads)
                    return False
    return True


def _say(dtype: torch.dtype, threads: int) -> None:
    # Half precision is so on some CPUs whatever one does.
    wide = dtype == torch.float32
    log.log(
        logging.WARNING if wide else logging.INFO,
        "%s products in %d threads are made in blocks of %d rows, which takes longer: on this CPU "
        "a row's bits would depend on its neighbours otherwise%s",
        str(dtype).removeprefix("torch."),
        threads,
        BLOCK_ROWS,
        f"; {PRODUCTS_ADVICE}" if wide else "",
    )
