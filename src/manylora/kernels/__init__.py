"""Arithmetic on plain tensors: many adapters' low-rank terms, and the base's products beside them.

Owns: `shrink_expand` and its backward, on row ranges; products with frozen weights, whose rows have
the same bits whatever the number of rows; what the CPU's vendor library needs for that.
Does not own: which token belongs to which adapter (lora), autograd.
Talks to: nobody; `lora` and `engine` call it.
"""

from manylora.kernels.frozen import (
    PRODUCTS_ADVICE,
    add_product,
    product,
    whole_products,
    write_product,
)
from manylora.kernels.lowrank import (
    Block,
    Columns,
    Member,
    SegmentWork,
    shrink_expand,
    shrink_expand_backward,
)
from manylora.kernels.vendor import settle_functions

__all__ = [
    "PRODUCTS_ADVICE",
    "Block",
    "Columns",
    "Member",
    "SegmentWork",
    "add_product",
    "product",
    "settle_functions",
    "shrink_expand",
    "shrink_expand_backward",
    "whole_products",
    "write_product",
]
