"""Products of few rows read frozen weights that are kept a second time, in oneDNN's own order.

A vendor's product of a few rows spends most of its time bringing the weights into an order that its
kernel reads, and one row alone goes through another kernel, with other bits. With weights that are
in that order already a row takes hardly longer than reading them, and on the CPUs that we saw all
numbers of rows have the same bits, from one on.

T rows, K terms of each sum, N columns.
"""

from functools import cache

import torch
from torch import Tensor

from manylora.kernels.row_counts import alike, some_rows

# The number of rows that the order is chosen for; it serves all others.
ROWS = 64


class PackedWeight:
    """A `PackedWeight` is a frozen weight [N, K] in oneDNN's order, with each column's bias."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None):
        """Copy the weight. Raises RuntimeError: the CPU has no products in this dtype."""
        # What torch's own compiler calls for a frozen linear layer.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK, ROWS)
        self._bias_N = bias_N

    def product(self, x_TK: Tensor) -> Tensor:
        """Return x · Wᵀ + bias, as a new [T, N]."""
        return self._multiply(x_TK, self._packed, self._bias_N, "none", [], "")


@cache
def safe_packed(
    terms: int, columns: int, bias: bool, dtype: torch.dtype, threads: int, counts: tuple[int, ...]
) -> frozenset[int]:
    """Return those of `counts` of which rows keep their bits; none without such products."""
    weight_NK = some_rows(columns, terms, dtype)
    bias_N = some_rows(1, columns, dtype)[0] if bias else None
    try:
        packed = PackedWeight(weight_NK, bias_N)
        return alike(packed.product, some_rows(counts[-1], terms, dtype), counts)
    except (RuntimeError, AttributeError, NotImplementedError):
        return frozenset()
