"""The outputs of micro-batches become each operation's result.

L rows of the head, M targets beyond the first of each row, N tokens of a datum, n of them whose
log-probabilities are wanted, K targets of each position; E values of each row by its first target:
log-probability, loss, and entropy if any is asked.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from manylora.engine.head_loss import HeadOutput
from manylora.engine.microbatch import MicroBatch
from manylora.engine.plan import Piece, Plan
from manylora.losses import Loss, Settings
from manylora.parallel import Axis
from manylora.types import Datum, ForwardBackward, ForwardBackwardResult
from manylora.types.data import Array


@dataclass(slots=True)
class Rows:
    """`Rows` are the results of one micro-batch, still on the device."""

    batch: MicroBatch
    out: HeadOutput


@dataclass(slots=True)
class PieceResult:
    """A `PieceResult` has each datum's wanted log-probabilities, and the sum of the losses.

    `entropies` are of the same positions; there are none if they are not asked.
    """

    logprobs: list[Array]
    loss: float
    entropies: list[Array] = field(default_factory=list)


# By the number of the operation and of the piece's first datum in it.
Found: TypeAlias = dict[tuple[int, int], PieceResult]

# Of each operation, by its number in the call.
Losses: TypeAlias = Sequence[tuple[Loss, Settings]]

# Reads the next rows of a datum.
Reader: TypeAlias = Callable[[int, Datum], Array]


def found(rows: Iterable[Rows], losses: Losses) -> Found:
    """Cut the micro-batches' outputs up again by piece."""
    pieces: Found = {}
    for row in rows:
        if not row.batch.pieces:
            continue
        # One transfer a micro-batch, after all of them have been started.
        first_L = [row.out.logprobs_L, row.out.loss_L]
        if row.out.entropy_L is not None:
            first_L.append(row.out.entropy_L)
        first_EL = torch.stack(first_L).cpu().numpy()
        more_2M = _more(row.out)
        head = row.batch.head
        for piece, *spans in zip(row.batch.pieces, head.trained, head.read, strict=True):
            trained, read = (
                _Section(first_EL[:, slice(*span)], more_2M[:, slice(*head.more_span(*span))])
                for span in spans
            )
            own = losses[piece.work][0]
            # The rows that are only read have a loss of 0; unless something is not finite.
            result = PieceResult([], trained.loss() + read.loss())
            for datum in piece.data:
                result.logprobs.append(_wanted(datum, own, piece, trained.read, read.read))
                if piece.entropy:
                    readers = trained.read_entropy, read.read_entropy
                    result.entropies.append(_wanted(datum, own, piece, *readers))
            pieces[piece.work, piece.first] = result
    return pieces


def gathered(own: Found, plan: Plan, losses: Losses, axis: Axis, device: torch.device) -> Found:
    """Gather what every rank found, by one collective; each knows its size from the plan.

    One rank sends nothing and gets its own back.
    """
    if axis.size == 1:
        return own
    lists = [[piece for batch in batches for piece in batch] for batches in plan.batches]
    numbers = max(sum(_numbers(piece, losses) for piece in pieces) for pieces in lists)
    if numbers == 0:
        return own
    sent = np.zeros(numbers, np.float32)
    end = 0
    for piece in lists[axis.index]:
        result = own[piece.work, piece.first]
        loss = np.array([result.loss], np.float64).view(np.float32)
        for part in (loss, *result.logprobs, *result.entropies):
            sent[end : end + part.size] = part.ravel()
            end += part.size
    received = axis.gather(torch.from_numpy(sent).to(device)).cpu().numpy()
    everything: Found = {}
    for pieces, row in zip(lists, received, strict=True):
        end = 0
        for piece in pieces:
            part, end = row[end : end + _numbers(piece, losses)], end + _numbers(piece, losses)
            everything[piece.work, piece.first] = _read(piece, losses, part)
    return everything


def results(
    pieces: Found, plan: Plan, losses: Losses, runnable: Sequence[tuple[int, ForwardBackward]]
) -> Iterator[tuple[int, ForwardBackwardResult]]:
    """Put each operation's result together, in the order of its data."""
    logprobs: dict[int, list[Array]] = {number: [] for number, _ in runnable}
    entropies: dict[int, list[Array]] = {number: [] for number, _ in runnable}
    sums: dict[int, list[float]] = {number: [] for number, _ in runnable}
    for piece in plan.pieces:
        result = pieces[piece.work, piece.first]
        logprobs[piece.work] += result.logprobs
        entropies[piece.work] += result.entropies
        sums[piece.work].append(result.loss)
    for number, work in runnable:
        total = float(sum(sums[number]))
        positions = None
        if work.logprobs == "trained":
            trained = losses[number][0].trained
            positions = tuple(np.flatnonzero(trained(datum)) for datum in work.data)
        yield (
            number,
            ForwardBackwardResult(
                tuple(logprobs[number]),
                total,
                {"loss:sum": total},
                positions,
                entropies=tuple(entropies[number]) if work.entropy else None,
            ),
        )


class _Section:
    """A section has a piece's numbers in one part of the head's rows, read datum by datum."""

    def __init__(self, first_En: Array, more_2m: Array):
        """Take log-probabilities and losses, by the first target and by the others, and by the
        first perhaps entropies."""
        self._first, self._more = first_En, more_2m
        self._row = self._other = self._entropy = 0

    def loss(self) -> float:
        """Return the sum of the losses."""
        return float(self._first[1].sum(dtype=np.float64) + self._more[1].sum(dtype=np.float64))

    def read(self, rows: int, datum: Datum) -> Array:
        """Return the next rows' log-probabilities, [n] or [n, K] as the datum's targets are."""
        first_n = self._first[0, self._row : self._row + rows]
        self._row += rows
        if datum.loss_inputs["target_tokens"].ndim == 1:
            return first_n
        others = datum.num_targets - 1
        count = rows * others
        others_nK = self._more[0, self._other : self._other + count].reshape(rows, others)
        self._other += count
        return np.concatenate([first_n[:, None], others_nK], axis=1)

    def read_entropy(self, rows: int, _datum: Datum) -> Array:
        """Return the next rows' entropies [n]."""
        self._entropy += rows
        return self._first[2, self._entropy - rows : self._entropy]


def _wanted(datum: Datum, loss: Loss, piece: Piece, trained: Reader, read: Reader) -> Array:
    """Choose what is wanted of a datum's values, of its trained rows and of those only read."""
    trained_N = loss.trained(datum)
    rows = int(np.count_nonzero(trained_N))
    values = trained(rows, datum)
    if piece.wanted == "trained" or rows == len(datum):
        return values
    whole = np.empty((len(datum), *values.shape[1:]), np.float32)
    whole[trained_N] = values
    whole[~trained_N] = read(len(datum) - rows, datum)
    return whole


def _shapes(piece: Piece, losses: Losses) -> list[tuple[int, ...]]:
    """Return the shapes of what is wanted of each datum's log-probabilities."""
    shapes = [datum.loss_inputs["target_tokens"].shape for datum in piece.data]
    if piece.wanted == "all":
        return shapes
    trained = losses[piece.work][0].trained
    return [
        (int(np.count_nonzero(trained(datum))), *shape[1:])
        for datum, shape in zip(piece.data, shapes, strict=True)
    ]


def _numbers(piece: Piece, losses: Losses) -> int:
    """Count the fp32 numbers of a piece's result; a loss, in fp64, takes the place of two."""
    shapes = _shapes(piece, losses)
    entropies = sum(shape[0] for shape in shapes) if piece.entropy else 0
    return 2 + sum(math.prod(shape) for shape in shapes) + entropies


def _read(piece: Piece, losses: Losses, row: Array) -> PieceResult:
    loss = float(row[:2].copy().view(np.float64)[0])
    shapes = _shapes(piece, losses)
    entropic = [shape[:1] for shape in shapes] if piece.entropy else []
    arrays: list[Array] = []
    start = 2
    for shape in (*shapes, *entropic):
        arrays.append(row[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)
    return PieceResult(arrays[: len(shapes)], loss, arrays[len(shapes) :])


def _more(out: HeadOutput) -> Array:
    """Return log-probabilities and losses [2, M] of the targets beyond the first."""
    if out.more_logprobs_M is None or out.more_loss_M is None:
        return np.zeros((2, 0), np.float32)
    return torch.stack([out.more_logprobs_M, out.more_loss_M]).cpu().numpy()
