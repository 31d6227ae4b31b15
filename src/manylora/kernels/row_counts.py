"""The numbers of rows that give a row the same bits are found by trying, alike at every start.

Nothing is timed. What is tried are all the numbers that will be used, at changing places of a
larger whole, bit for bit; so what comes out depends on the machine, the number of threads and the
shapes alone.

T rows, K terms of each sum, N columns.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

# Elements that one thread takes at least (at::internal::GRAIN_SIZE), and how many the widest vector
# loop takes at once: where every thread's share is a multiple of them, no element is at a ragged
# end, which another kernel computes.
GRAIN, UNROLLED = 1 << 15, 64

# A function is tried on so many elements at most; with more, its threads' shares decide.
TRIED_ELEMENTS = 1 << 18

# What models compute of every element, or of every row.
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.exp,
    torch.cos,
    torch.sin,
    torch.tanh,
    torch.sigmoid,
    torch.rsqrt,
    functional.silu,
    functional.gelu,
    lambda x_TN: functional.gelu(x_TN, approximate="tanh"),
    lambda x_TN: x_TN.float().pow(2).mean(-1, keepdim=True),
    lambda x_TN: x_TN.sum(-1, keepdim=True),
    lambda x_TN: functional.layer_norm(x_TN, x_TN.shape[1:]),
)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """`RowCounts` are the numbers of rows that a step may have.

    Attributes:
        counts: ascending.
        multiple: beyond the last one, multiples of this.
    """

    counts: tuple[int, ...]
    multiple: int

    def holding(self, rows: int) -> int:
        """Return the least of them that holds `rows` rows."""
        found = next((count for count in self.counts if count >= rows), None)
        return -(-rows // self.multiple) * self.multiple if found is None else found


def ladder(most: int) -> tuple[int, ...]:
    """Return the numbers worth trying: all up to 8, then eight for every doubling or fewer."""
    counts: list[int] = []
    count = 1
    while count < most:
        counts.append(count)
        count += max(1, 1 << max(0, count.bit_length() - 3))
    return (*counts, most)


def alike(
    make: Callable[[Tensor], Tensor], whole_TK: Tensor, counts: Iterable[int]
) -> frozenset[int]:
    """Return those of `counts` of which rows get the bits that they get among all of `whole_TK`."""
    expected_TN = make(whole_TK)
    found = []
    for count in counts:
        first = 7 * count % (len(whole_TK) - count + 1)
        part = slice(first, first + count)
        if torch.equal(make(whole_TK[part].clone()), expected_TN[part]):
            found.append(count)
    return frozenset(found)


def some_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return random numbers of several magnitudes, always the same."""
    generator = torch.Generator().manual_seed(rows * columns)
    numbers = torch.randn(rows, columns, generator=generator)
    return numbers.mul_(torch.logspace(-1, 1, rows)[:, None]).to(dtype)


@cache
def safe_for_functions(
    width: int, dtype: torch.dtype, threads: int, counts: tuple[int, ...]
) -> frozenset[int]:
    """Return the `counts` of which rows of this width keep their bits in elementwise functions."""
    even = tuple(count for count in counts if _even_shares(count * width, threads))
    tried = tuple(count for count in even if count * width <= TRIED_ELEMENTS)
    if not tried:
        return frozenset()
    whole_TN = some_rows(tried[-1], width, dtype).abs_()
    differing = set[int]()
    for function in FUNCTIONS:
        differing |= set(tried) - alike(function, whole_TN, tried)
    return frozenset(even) - differing


def _even_shares(elements: int, threads: int) -> bool:
    """Return whether no thread's share of the elements has a ragged end (see at::parallel_for)."""
    used = 1 if elements < GRAIN else min(threads, -(-elements // GRAIN))
    return elements % UNROLLED == 0 and -(-elements // used) % UNROLLED == 0
