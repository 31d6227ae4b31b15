"""Cutting work into pieces, and pieces into micro-batches.

The one rule that makes every adapter's numbers its own: how an adapter's work is cut depends on
that work alone. Pieces are then packed whole beside other adapters' pieces, in order, so each
adapter's gradient is the same sum of the same products whoever its neighbours are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manylora.types import Datum, ForwardBackward

# Pieces are at most this share of a micro-batch, so that whole pieces fill it well.
PIECES_PER_BATCH = 4


@dataclass(slots=True)
class Piece:
    """Neighbouring data of one operation that run together.

    Attributes:
        work: number of the operation in the call.
        adapter: whose it is.
        first: number of its first datum within the operation.
        data: the data themselves.
        rows: their tokens.
    """

    work: int
    adapter: str
    first: int
    data: Sequence[Datum]
    rows: int


def cut(number: int, work: ForwardBackward, token_budget: int) -> list[Piece]:
    """Cut one operation into pieces of at most a quarter of the budget; a longer datum is alone."""
    limit = max(1, token_budget // PIECES_PER_BATCH)
    pieces: list[Piece] = []
    start, rows = 0, 0
    for index, datum in enumerate(work.data):
        if index > start and rows + len(datum) > limit:
            pieces.append(Piece(number, work.adapter, start, work.data[start:index], rows))
            start, rows = index, 0
        rows += len(datum)
    if len(work.data) > start:
        pieces.append(Piece(number, work.adapter, start, work.data[start:], rows))
    return pieces


def pack(pieces: Iterable[Piece], token_budget: int) -> list[list[Piece]]:
    """Fill micro-batches with whole pieces, sorted by adapter, up to the budget.

    An adapter's pieces keep their order. A piece beyond the budget is a micro-batch of its own.
    """
    first_seen: dict[str, int] = {}
    queue = list(pieces)
    for piece in queue:
        first_seen.setdefault(piece.adapter, len(first_seen))
    batches: list[list[Piece]] = []
    filled = 0
    for piece in sorted(queue, key=lambda p: first_seen[p.adapter]):
        if not batches or filled + piece.rows > token_budget:
            batches.append([])
            filled = 0
        batches[-1].append(piece)
        filled += piece.rows
    return batches
