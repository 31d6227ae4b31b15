"""A plan cuts work into pieces, and deals the pieces out into micro-batches.

One rule makes every adapter's numbers its own: how an adapter's work is cut depends on
that work alone. Pieces are then packed whole beside other adapters' pieces, in order, so each
adapter's gradient is the same sum of the same products, whatever neighbours it has.

Over several data-parallel ranks the rule goes on: an operation's pieces are dealt into shares, a
function of that operation alone. Share s runs on rank (home + s) mod n. An adapter's home is
chosen for balance, and kept while gradients are pending, so that each share is summed in one
place; the shares are later added up in their order, wherever they were.

A plan is a function of the operations and of what every rank knows of the adapters, so all ranks
make the same one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from manylora.types import Datum, ForwardBackward, Wanted

# Pieces are at most this share of a micro-batch, so that whole pieces fill it well.
PIECES_PER_BATCH = 4


class FrozenWeights(NamedTuple):
    """`FrozenWeights` are a snapshot's; without one, those of the bare base."""

    snapshot: str | None


# The name of the adapter whose weights run, or such as nobody trains.
Whose = str | FrozenWeights


@dataclass(slots=True)
class Piece:
    """A piece is neighbouring data of one operation that run together.

    Attributes:
        work: number of the operation in the call.
        whose: the weights that it runs with.
        first: number of its first datum within the operation.
        data: the data themselves.
        rows: their tokens.
        draw: its position in the adapter's random stream.
        share: which share of the operation it belongs to.
        wanted: which log-probabilities the operation wants.
        temperature: of the operation.
        entropy: whether the operation wants entropies.
    """

    work: int
    whose: Whose
    first: int
    data: Sequence[Datum]
    rows: int
    draw: int = 0
    share: int = 0
    wanted: Wanted = "all"
    temperature: float = 1.0
    entropy: bool = False


@dataclass(slots=True)
class Plan:
    """A plan says which rank runs what.

    Attributes:
        pieces: all of them, in the order of the operations and of their data.
        batches: for each rank its micro-batches; equally many, the last ones may be empty.
        homes: of every adapter, or frozen weights, with pieces.
        shares: how many shares of each have pieces; they are the first ones.
    """

    pieces: list[Piece]
    batches: list[list[list[Piece]]]
    homes: dict[Whose, int]
    shares: dict[Whose, int]

    def counts(self) -> dict[Whose, int]:
        """Count the pieces of every adapter."""
        return Counter(piece.whose for piece in self.pieces)


def make_plan(
    works: Iterable[tuple[int, ForwardBackward]],
    token_budget: int,
    *,
    draws: Mapping[str, int],
    ranks: int = 1,
    homes: Mapping[str, int | None] | None = None,
) -> Plan:
    """Cut, deal out and pack.

    Args:
        works: operations with their numbers in the call.
        draws: where each adapter stands in its random stream.
        ranks: data-parallel ranks.
        homes: of the adapters with pending gradients; None or absent = to be chosen.
    """
    pieces: list[Piece] = []
    position: dict[Whose, int] = {}
    for number, work in works:
        own = cut(number, work, token_budget)
        deal(own, ranks)
        name = whose(work)
        # What is frozen runs without a gradient, and nothing is drawn for it.
        start = position.setdefault(name, draws[name] if isinstance(name, str) else 0)
        for offset, piece in enumerate(own):
            piece.draw = start + offset
        position[name] += len(own)
        pieces += own
    shares: dict[Whose, int] = {}
    for piece in pieces:
        shares[piece.whose] = max(shares.get(piece.whose, 0), piece.share + 1)
    chosen = choose_homes(pieces, ranks, homes or {})
    queues: list[list[Piece]] = [[] for _ in range(ranks)]
    for piece in pieces:
        queues[(chosen[piece.whose] + piece.share) % ranks].append(piece)
    batches = [pack(queue, token_budget) for queue in queues]
    longest = max(len(own_batches) for own_batches in batches)
    for own_batches in batches:
        own_batches += [[] for _ in range(longest - len(own_batches))]
    return Plan(pieces, batches, chosen, shares)


def whose(work: ForwardBackward) -> Whose:
    """Return the weights that an operation runs with."""
    if work.snapshot is not None or work.adapter is None:
        return FrozenWeights(work.snapshot)
    return work.adapter


def cut(number: int, work: ForwardBackward, token_budget: int) -> list[Piece]:
    """Cut one operation into pieces of at most a quarter of the budget; a longer datum is alone."""
    limit = max(1, token_budget // PIECES_PER_BATCH)
    pieces: list[Piece] = []

    def close(start: int, stop: int, rows: int) -> None:
        piece = Piece(number, whose(work), start, work.data[start:stop], rows)
        piece.wanted, piece.temperature = work.logprobs, work.temperature
        piece.entropy = work.entropy
        pieces.append(piece)

    start, rows = 0, 0
    for index, datum in enumerate(work.data):
        if index > start and rows + len(datum) > limit:
            close(start, index, rows)
            start, rows = index, 0
        rows += len(datum)
    if len(work.data) > start:
        close(start, len(work.data), rows)
    return pieces


def deal(pieces: Sequence[Piece], shares: int) -> None:
    """Deal one operation's pieces into shares: the longest first, each onto the lightest."""
    if shares == 1:
        return
    loads = [0] * shares
    for piece in sorted(pieces, key=lambda p: -p.rows):
        piece.share = min(range(shares), key=loads.__getitem__)
        loads[piece.share] += piece.rows


def choose_homes(
    pieces: Iterable[Piece], ranks: int, kept: Mapping[str, int | None]
) -> dict[Whose, int]:
    """Choose a home for every adapter, such that the ranks' tokens are as equal as may be.

    The adapters that have a home come first, then the heaviest. Each goes where the sum of the
    squares of the loads stays smallest.
    """
    tokens: dict[Whose, list[int]] = {}
    for piece in pieces:
        tokens.setdefault(piece.whose, [0] * ranks)[piece.share] += piece.rows
    loads = [0] * ranks
    homes: dict[Whose, int] = {}

    def settled(name: Whose) -> int | None:
        return kept.get(name) if isinstance(name, str) else None

    # Sorting is stable, so equals keep the order of the call.
    for name in sorted(tokens, key=lambda a: (settled(a) is None, -sum(tokens[a]))):
        own, home = tokens[name], settled(name)
        if home is None:
            # Σ (load + own)² differs between homes by 2 Σ load · own only.
            cost = [_product(loads, own, start) for start in range(ranks)]
            home = cost.index(min(cost))
        homes[name] = home
        for share, rows in enumerate(own):
            loads[(home + share) % ranks] += rows
    return homes


def pack(pieces: Iterable[Piece], token_budget: int) -> list[list[Piece]]:
    """Fill micro-batches with whole pieces, sorted by adapter, up to the budget.

    An adapter's pieces keep their order. A piece beyond the budget is a micro-batch of its own.
    """
    first_seen: dict[Whose, int] = {}
    queue = list(pieces)
    for piece in queue:
        first_seen.setdefault(piece.whose, len(first_seen))
    batches: list[list[Piece]] = []
    filled = 0
    for piece in sorted(queue, key=lambda p: first_seen[p.whose]):
        if not batches or filled + piece.rows > token_budget:
            batches.append([])
            filled = 0
        batches[-1].append(piece)
        filled += piece.rows
    return batches


def _product(loads: Sequence[int], own: Sequence[int], home: int) -> int:
    return sum(loads[(home + share) % len(loads)] * rows for share, rows in enumerate(own))
