"""The packed stream that a base runs on: many sequences end to end in one row, no padding between.

T tokens of the stream (padding rows at its end included), S sequences, L longest cached sequence,
H key-value heads, D head dimension.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

# On CPU a row of a matrix product has the same bits whatever the number of rows, from 8 rows on,
# and an elementwise kernel handles every element alike when no thread's share has a ragged end.
# Both hold for streams whose length is a multiple of this.
ROW_MULTIPLE = 32


def padded_rows(rows: int) -> int:
    """The stream length that holds `rows` rows."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


class KVCache:
    """Keys and values of S sequences, for decoding one token of each at a time.

    Sequences are left-aligned, so a token's place in the cache is its position.
    """

    def __init__(self, num_sequences: int, max_length: int):
        self.num_sequences = num_sequences
        self.max_length = max_length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [S, H, L, D] of one layer; `like` is [1, H, T, D]."""
        if number not in self.layers:
            shape = (self.num_sequences, like.shape[1], self.max_length, like.shape[3])
            self.layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[number]

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences (int64 [S'])."""
        self.num_sequences = len(rows)
        self.layers = {n: (k[rows], v[rows]) for n, (k, v) in self.layers.items()}


@dataclass(slots=True)
class PackedStream:
    """Where the sequences lie in the stream, and what attention may read beside it.

    Attributes:
        lengths: tokens of each sequence, in order; they end before the padding rows.
        total: T.
        cache: filled during a prefill, read and extended during decoding.
        decoding: every sequence is one new token; it attends to its cache.
        decode_positions: int64 [S], position of each new token.
    """

    lengths: Sequence[int]
    total: int
    cache: KVCache | None = None
    decoding: bool = False
    decode_positions: Tensor | None = None
    _cu_seqlens: Tensor | None = field(default=None)
    _runs: list[tuple[int, int]] | None = field(default=None)

    @property
    def num_padding(self) -> int:
        return self.total - sum(self.lengths)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """int32 [S + 1 (+ 1)]: where each sequence begins and ends; padding is one more."""
        if self._cu_seqlens is None:
            lengths = [*self.lengths, *([self.num_padding] if self.num_padding else [])]
            starts = torch.tensor([0, *lengths]).cumsum(0)
            self._cu_seqlens = starts.to(device, torch.int32)
        return self._cu_seqlens

    def runs(self) -> list[tuple[int, int]]:
        """Neighbouring sequences of one length, as (how many, length)."""
        if self._runs is None:
            runs: list[tuple[int, int]] = []
            for length in self.lengths:
                if runs and runs[-1][1] == length:
                    runs[-1] = (runs[-1][0] + 1, length)
                else:
                    runs.append((1, length))
            self._runs = runs
        return self._runs


_current: PackedStream | None = None


@contextmanager
def packed(stream: PackedStream) -> Iterator[PackedStream]:
    """Make `stream` the one that attention reads; held around forward and backward."""
    global _current
    assert _current is None, "a stream is already running"
    _current = stream
    try:
        yield stream
    finally:
        _current = None


def current_stream() -> PackedStream | None:
    """The stream that is running, if any."""
    return _current
