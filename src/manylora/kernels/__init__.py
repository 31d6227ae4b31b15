"""The low-rank operation: the arithmetic of many adapters beside one base product.

Owns: `shrink_expand` and its backward, on plain tensors and row ranges.
Does not own: which token belongs to which adapter (lora), autograd, the base's own product.
Talks to: nobody; `lora` calls it.
"""

from manylora.kernels.lowrank import (
    Block,
    Columns,
    Member,
    SegmentWork,
    shrink_expand,
    shrink_expand_backward,
)

__all__ = ["Block", "Columns", "Member", "SegmentWork", "shrink_expand", "shrink_expand_backward"]
