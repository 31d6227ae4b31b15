"""This room computes on plain tensors: many adapters' low-rank terms, and the base's products.

Owns: `shrink_expand` and its backward on row ranges, for each kind of device; the same for single
rows; products with frozen weights, whose rows have the same bits whatever the number of rows;
finding out which numbers of rows those are; what the CPU's vendor library needs for that.
Does not own: which token belongs to which adapter (lora), autograd.
Talks to: types below; `lora` and `engine` call it.
"""

from manylora.kernels.by_device import LOWRANK, LowRank, low_rank_on
from manylora.kernels.dtypes import DTYPES
from manylora.kernels.frozen import (
    PRODUCTS_ADVICE,
    add_product,
    product,
    safe_plain,
    whole_products,
    write_product,
)
from manylora.kernels.lowrank import (
    Block,
    Columns,
    SegmentWork,
    SiteFactor,
    shrink_expand,
    shrink_expand_backward,
)
from manylora.kernels.prepacked import PackedWeight, safe_packed
from manylora.kernels.row_counts import RowCounts, ladder, safe_for_functions
from manylora.kernels.rowwise import RowBatch, add_by_row, row_batches
from manylora.kernels.vendor import settle_functions

__all__ = [
    "DTYPES",
    "LOWRANK",
    "PRODUCTS_ADVICE",
    "Block",
    "Columns",
    "LowRank",
    "PackedWeight",
    "RowBatch",
    "RowCounts",
    "SegmentWork",
    "SiteFactor",
    "add_by_row",
    "add_product",
    "ladder",
    "low_rank_on",
    "product",
    "row_batches",
    "safe_for_functions",
    "safe_packed",
    "safe_plain",
    "settle_functions",
    "shrink_expand",
    "shrink_expand_backward",
    "whole_products",
    "write_product",
]
