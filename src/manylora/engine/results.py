"""The outputs of micro-batches become each operation's result.

L rows of the head, M targets beyond the first of each row, N tokens of a datum, n of them whose
log-probabilities are wanted, K targets of each position.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    """A `PieceResult` has each datum's wanted log-probabilities, and the sum of the losses."""

    logprobs: list[Array]
    loss: float


# By the number of the operation and of the piece's first datum in it.
Found: TypeAlias = dict[tuple[int, int], PieceResult]

# Of each operation, by its number in the call.
Losses: TypeAlias = Sequence[tuple[Loss, Settings]]


def found(rows: Iterable[Rows], losses: Losses) -> Found:
    """Cut the micro-batches' outputs up again by piece."""
    pieces: Found = {}
    for row in rows:
        if not row.batch.pieces:
            continue
        # One transfer a micro-batch, after all of them have been started.
        first_2L = torch.stack([row.out.logprobs_L, row.out.loss_L]).cpu().numpy()
        more_2M = _more(row.out)
        head = row.batch.head
        for piece, *spans in zip(row.batch.pieces, head.trained, head.read, strict=True):
            sections = [
                _Section(first_2L[:, slice(*span)], more_2M[:, slice(*head.more_span(*span))])
                for span in spans
            ]
            logprobs = [
                _wanted(datum, losses[piece.work][0], piece, *sections) for datum in piece.data
            ]
            # The rows that are only read have a loss of 0; unless something is not finite.
            loss = sum(section.loss() for section in sections)
            pieces[piece.work, piece.first] = PieceResult(logprobs, loss)
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
        for part in (loss, *result.logprobs):
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
    sums: dict[int, list[float]] = {number: [] for number, _ in runnable}
    for piece in plan.pieces:
        result = pieces[piece.work, piece.first]
        logprobs[piece.work] += result.logprobs
        sums[piece.work].append(result.loss)
    for number, work in runnable:
        total = float(sum(sums[number]))
        positions = None
        if work.logprobs == "trained":
            trained = losses[number][0].trained
            positions = tuple(np.flatnonzero(trained(datum)) for datum in work.data)
        metrics = {"loss:sum": total}
        yield number, ForwardBackwardResult(tuple(logprobs[number]), total, metrics, positions)


class _Section:
    """A section has a piece's numbers in one part of the head's rows, read datum by datum."""

    def __init__(self, first_2n: Array, more_2m: Array):
        """Take log-probabilities and losses, by the first target and by the others."""
        self._first, self._more = first_2n, more_2m
        self._row = self._other = 0

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


def _wanted(datum: Datum, loss: Loss, piece: Piece, trained: _Section, read: _Section) -> Array:
    """Choose what is wanted of a datum's log-probabilities."""
    trained_N = loss.trained(datum)
    rows = int(np.count_nonzero(trained_N))
    values = trained.read(rows, datum)
    if piece.wanted == "trained" or rows == len(datum):
        return values
    whole = np.empty((len(datum), *values.shape[1:]), np.float32)
    whole[trained_N] = values
    whole[~trained_N] = read.read(len(datum) - rows, datum)
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
    return 2 + sum(math.prod(shape) for shape in _shapes(piece, losses))


def _read(piece: Piece, losses: Losses, row: Array) -> PieceResult:
    loss = float(row[:2].copy().view(np.float64)[0])
    logprobs: list[Array] = []
    start = 2
    for shape in _shapes(piece, losses):
        logprobs.append(row[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)
    return PieceResult(logprobs, loss)


def _more(out: HeadOutput) -> Array:
    """Return log-probabilities and losses [2, M] of the targets beyond the first."""
    if out.more_logprobs_M is None or out.more_loss_M is None:
        return np.zeros((2, 0), np.float32)
    return torch.stack([out.more_logprobs_M, out.more_loss_M]).cpu().numpy()
