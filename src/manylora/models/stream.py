"""A base runs on a packed stream: many sequences end to end in one row, no padding between.

T tokens of the stream (padding rows at its end included), S sequences.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manylora.models.cache import DecodeStep, Filling

# On CPU a row of a frozen product (`kernels.frozen`) has the same bits whatever the number of rows,
# from 8 rows on, and an elementwise kernel handles every element alike when no thread's share has a
# ragged end. Both hold for streams whose length is a multiple of this.
ROW_MULTIPLE = 32
# In fp32 it holds for multiples of this too (the widest vector of a CPU), where rows are of even
# length. Decoding uses it: few rows are the rule there, and padding costs as much as tokens.
DECODE_MULTIPLE = 16


def padded_rows(rows: int, multiple: int = ROW_MULTIPLE) -> int:
    """Return the stream length that holds `rows` rows."""
    return -(-rows // multiple) * multiple


def decode_multiple(dtype: torch.dtype, vocab: int) -> int:
    """Return what a decode step's rows are a multiple of; the longest of them are logits."""
    return DECODE_MULTIPLE if dtype == torch.float32 and vocab % 2 == 0 else ROW_MULTIPLE


@dataclass(slots=True)
class PackedStream:
    """A `PackedStream` says where its sequences lie, and what attention may read beside it.

    Attributes:
        lengths: tokens of each sequence, in order; they end before the padding rows.
        total: T.
        filling: where each sequence's keys and values are to be kept, and how many tokens of it
            are kept there already; None = nowhere.
        decoding: every sequence is one new token, which attends to what is kept of it.
    """

    lengths: Sequence[int]
    total: int
    filling: Filling | None = None
    decoding: DecodeStep | None = None
    _cu_seqlens: Tensor | None = field(default=None)
    _runs: list[tuple[int, int]] | None = field(default=None)
    _calls: int = field(default=0)

    def next_call(self) -> int:
        """Return the number of this call of attention among those of the stream's forward."""
        self._calls += 1
        return self._calls - 1

    @property
    def num_padding(self) -> int:
        return self.total - sum(self.lengths)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Return int32 [S + 1 (+ 1)]: where each sequence begins and ends; padding is one more."""
        if self._cu_seqlens is None:
            lengths = [*self.lengths, *([self.num_padding] if self.num_padding else [])]
            starts = torch.tensor([0, *lengths]).cumsum(0)
            self._cu_seqlens = starts.to(device, torch.int32)
        return self._cu_seqlens

    def runs(self) -> list[tuple[int, int]]:
        """Return neighbouring sequences of one length, as (how many, length).

        A sequence that goes on from what is kept of it is a run of its own.
        """
        if self._runs is None:
            runs: list[tuple[int, int]] = []
            fresh = False
            for number, length in enumerate(self.lengths):
                begins = self.kept(number) == 0
                if runs and runs[-1][1] == length and begins and fresh:
                    runs[-1] = (runs[-1][0] + 1, length)
                else:
                    runs.append((1, length))
                fresh = begins
            self._runs = runs
        return self._runs

    def kept(self, number: int) -> int:
        """Return how many tokens of a sequence come before those in the stream."""
        return 0 if self.filling is None else self.filling.kept[number]


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
    """Return the stream that is running, if any."""
    return _current
