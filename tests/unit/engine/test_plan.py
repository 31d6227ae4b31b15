"""Cutting and packing: an adapter's pieces depend on its own work alone."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine.plan import PIECES_PER_BATCH, cut, pack
from manylora.types import Datum, ForwardBackward

LENGTHS = st.lists(st.integers(1, 40), max_size=12)
BUDGETS = st.integers(1, 120)
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=100)


def work(name: str, lengths: list[int]) -> ForwardBackward:
    data = [Datum(np.zeros(n, np.int64), {"target_tokens": np.zeros(n, np.int64)}) for n in lengths]
    return ForwardBackward(adapter=name, data=data)


@EXAMPLES
@given(LENGTHS, BUDGETS)
def test_pieces_are_all_the_data_in_order(lengths: list[int], budget: int):
    own = work("a", lengths)
    pieces = cut(3, own, budget)
    assert [d for piece in pieces for d in piece.data] == list(own.data)
    first = 0
    for piece in pieces:
        assert (piece.work, piece.adapter, piece.first) == (3, "a", first)
        assert piece.rows == sum(map(len, piece.data)) > 0
        assert len(piece.data) == 1 or piece.rows <= max(1, budget // PIECES_PER_BATCH)
        first += len(piece.data)


@EXAMPLES
@given(st.lists(LENGTHS, min_size=1, max_size=4), BUDGETS)
def test_batches_hold_whole_pieces_sorted_by_adapter(crowd: list[list[int]], budget: int):
    works = [work("abca"[i], lengths) for i, lengths in enumerate(crowd)]
    pieces = [p for number, w in enumerate(works) for p in cut(number, w, budget)]
    batches = pack(pieces, budget)
    assert all(batches)
    assert sorted(map(id, pieces)) == sorted(id(p) for batch in batches for p in batch)
    for batch in batches:
        assert len(batch) == 1 or sum(p.rows for p in batch) <= budget
    flat = [p for batch in batches for p in batch]
    for name in "abc":
        assert [p for p in flat if p.adapter == name] == [p for p in pieces if p.adapter == name]
    changes = sum(a.adapter != b.adapter for a, b in pairwise(flat))
    assert changes == max(len({p.adapter for p in flat}) - 1, 0)
