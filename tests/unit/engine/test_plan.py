"""Cutting, dealing and packing: what becomes of an adapter's work depends on that work alone."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine.plan import PIECES_PER_BATCH, Plan, cut, deal, make_plan, pack
from manylora.types import Datum, ForwardBackward

LENGTHS = st.lists(st.integers(1, 40), max_size=12)
CROWDS = st.lists(LENGTHS, min_size=1, max_size=6)
BUDGETS = st.integers(1, 120)
RANKS = st.integers(1, 5)
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=100)
NAMES = "abcabd"


def work(name: str, lengths: list[int]) -> ForwardBackward:
    data = [Datum(np.zeros(n, np.int64), {"target_tokens": np.zeros(n, np.int64)}) for n in lengths]
    return ForwardBackward(adapter=name, data=data)


def works_of(crowd: list[list[int]]) -> list[tuple[int, ForwardBackward]]:
    return [(i, work(NAMES[i], lengths)) for i, lengths in enumerate(crowd)]


def plan_of(
    works: list[tuple[int, ForwardBackward]],
    budget: int,
    ranks: int,
    homes: dict[str, int | None] | None = None,
) -> Plan:
    draws: dict[str, int] = dict.fromkeys("abcd", 7)
    return make_plan(works, budget, draws=draws, ranks=ranks, homes=homes)


def loads_of(plan: Plan) -> list[int]:
    return [sum(p.rows for batch in own for p in batch) for own in plan.batches]


@EXAMPLES
@given(LENGTHS, BUDGETS)
def test_pieces_are_all_the_data_in_order(lengths: list[int], budget: int):
    own = work("a", lengths)
    pieces = cut(3, own, budget)
    assert [d for piece in pieces for d in piece.data] == list(own.data)
    first = 0
    for piece in pieces:
        assert (piece.work, piece.whose, piece.first) == (3, "a", first)
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
        assert [p for p in flat if p.whose == name] == [p for p in pieces if p.whose == name]
    changes = sum(a.whose != b.whose for a, b in pairwise(flat))
    assert changes == max(len({p.whose for p in flat}) - 1, 0)


@EXAMPLES
@given(LENGTHS, BUDGETS, RANKS)
def test_shares_are_the_first_ones_and_balanced(lengths: list[int], budget: int, shares: int):
    pieces = cut(0, work("a", lengths), budget)
    deal(pieces, shares)
    used = {piece.share for piece in pieces}
    assert used == set(range(min(len(pieces), shares)))
    loads = [sum(p.rows for p in pieces if p.share == share) for share in range(shares)]
    assert max(loads) - min(loads) <= max([p.rows for p in pieces], default=0)


@EXAMPLES
@given(CROWDS, BUDGETS, RANKS, st.lists(st.none() | st.integers(0, 4), min_size=4, max_size=4))
def test_every_piece_runs_once_where_its_share_is_at_home(
    crowd: list[list[int]], budget: int, ranks: int, kept: list[int | None]
):
    works = works_of(crowd)
    homes = {n: None if k is None else k % ranks for n, k in zip("abcd", kept, strict=True)}
    plan = plan_of(works, budget, ranks, homes)
    alike = plan_of(works_of(crowd), budget, ranks, homes)
    assert (plan.homes, plan.shares) == (alike.homes, alike.shares)
    assert [d for p in plan.pieces for d in p.data] == [d for _, w in works for d in w.data]
    ran = [p for own in plan.batches for batch in own for p in batch]
    assert sorted(map(id, ran)) == sorted(map(id, plan.pieces))
    for rank, own in enumerate(plan.batches):
        for piece in (p for batch in own for p in batch):
            home = homes[str(piece.whose)]
            assert home is None or plan.homes[piece.whose] == home
            assert (plan.homes[piece.whose] + piece.share) % ranks == rank
            assert piece.share < plan.shares[piece.whose] <= ranks
    # The same number for every rank, empty ones at the end.
    assert len({len(own) for own in plan.batches}) == 1
    for own in plan.batches:
        filled = [bool(batch) for batch in own]
        assert filled == sorted(filled, reverse=True)
    assert not plan.pieces or any(own[-1] for own in plan.batches)


@EXAMPLES
@given(CROWDS, BUDGETS, RANKS)
def test_draws_are_dealt_out_in_the_order_of_the_operations(
    crowd: list[list[int]], budget: int, ranks: int
):
    plan = plan_of(works_of(crowd), budget, ranks)
    for name, count in plan.counts().items():
        draws = [piece.draw for piece in plan.pieces if piece.whose == name]
        assert draws == list(range(7, 7 + count))


@EXAMPLES
@given(CROWDS, BUDGETS, RANKS)
def test_neighbours_change_neither_pieces_nor_shares(
    crowd: list[list[int]], budget: int, ranks: int
):
    works = works_of(crowd)
    together = plan_of(works, budget, ranks)
    for name in {w.adapter for _, w in works}:
        alone = plan_of([(n, w) for n, w in works if w.adapter == name], budget, ranks)
        own = [p for p in together.pieces if p.whose == name]
        assert [(p.first, p.rows, p.draw, p.share) for p in own] == [
            (p.first, p.rows, p.draw, p.share) for p in alone.pieces
        ]
        # On each rank in the same order, too.
        for share in range(ranks):
            lists = [
                [
                    (p.work, p.first)
                    for batch in plan.batches[(plan.homes[name] + share) % ranks]
                    for p in batch
                    if p.whose == name
                ]
                for plan in (together, alone)
                if name in plan.homes
            ]
            assert not lists or lists[0] == lists[1]


@EXAMPLES
@given(st.lists(LENGTHS, min_size=1, max_size=4), BUDGETS, RANKS)
def test_tokens_are_balanced(crowd: list[list[int]], budget: int, ranks: int):
    """Homes are chosen greedily, so that squares of what is too much add up at most."""
    works = [(i, work("abcd"[i], lengths)) for i, lengths in enumerate(crowd)]
    plan = plan_of(works, budget, ranks)
    loads = np.array(loads_of(plan))
    bound = 0.0
    for name in plan.homes:
        own = [p for p in plan.pieces if p.whose == name]
        shares = np.array([sum(p.rows for p in own if p.share == s) for s in range(ranks)])
        bound += np.sum((shares - shares.mean()) ** 2)
    assert np.sum((loads - loads.mean()) ** 2) <= bound + 1e-6


@EXAMPLES
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), RANKS)
def test_small_operations_go_where_there_is_least(lengths: list[int], ranks: int):
    """Of one piece each: nobody has more than the mean and one piece."""
    works = [(i, work(f"{i}", [n])) for i, n in enumerate(lengths)]
    plan = make_plan(works, 4096, draws={f"{i}": 0 for i in range(len(lengths))}, ranks=ranks)
    loads = loads_of(plan)
    assert max(loads) <= sum(loads) / ranks + max(lengths)
    assert max(loads) - min(loads) <= max(lengths)
