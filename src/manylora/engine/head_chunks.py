"""Logits exist for a bounded number of rows at a time, by the bytes that they take."""

import torch

from manylora.models.stream import ROW_MULTIPLE

# With a small vocabulary the logits of a chunk are this many numbers (16 MiB in fp32). With a large
# one that would be few rows, and every chunk reads the whole head again: then it has FEW_ROWS.
CHUNK_ELEMENTS = 1 << 22
FEW_ROWS = 256

# But never more than this.
MOST_BYTES = 64_000_000

CACHE_LINE = 64
FP32 = 4


def row_bytes(vocab: int, dtype: torch.dtype, *, capped: bool) -> int:
    """Return how many bytes one row of a chunk takes at most, forwards or backwards.

    Args:
        vocab: words of which this process has the logits.
        dtype: the base's.
        capped: whether the logits are.
    """
    # Logits, exponentials and the gradient, one after another in the same place.
    item = dtype.itemsize
    numbers = FP32 if dtype == torch.float32 else item + FP32
    if capped:
        numbers += FP32  # the cap's derivative
    if vocab * item % CACHE_LINE:
        numbers += item  # what an adapter on the head reads is copied
    return vocab * numbers


def chunk_rows(vocab: int, dtype: torch.dtype, *, capped: bool) -> int:
    """Return the most rows of a chunk."""
    most = MOST_BYTES // row_bytes(vocab, dtype, capped=capped)
    rows = min(max(CHUNK_ELEMENTS // vocab, FEW_ROWS), most)
    return max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE)
