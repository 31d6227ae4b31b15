"""Chunks of the loss: many rows with any vocabulary, and few bytes."""

import pytest
import torch

from manylora.engine.head_chunks import MOST_BYTES, chunk_rows, row_bytes
from manylora.models.stream import ROW_MULTIPLE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("vocab", "rows"),
    [(160, 26208), (8192, 512), (16_384, 256), (49_152, 256), (151_936, 96), (262_144, 32)],
)
def test_rows_at_some_vocabularies(vocab: int, rows: int):
    assert chunk_rows(vocab, torch.float32, capped=False) == rows


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [160, 331, 8192, 32_000, 49_152, 128_256, 151_936, 262_144])
def test_a_chunk_stays_below_its_bytes(vocab: int, dtype: torch.dtype, capped: bool):
    rows = chunk_rows(vocab, dtype, capped=capped)
    assert rows >= ROW_MULTIPLE and rows % ROW_MULTIPLE == 0
    # A chunk has 32 rows at least, whatever the vocabulary.
    assert rows * row_bytes(vocab, dtype, capped=capped) < MOST_BYTES or rows == ROW_MULTIPLE
    assert chunk_rows(vocab, dtype, capped=True) <= chunk_rows(vocab, dtype, capped=False)
