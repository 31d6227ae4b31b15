"""From the outputs of micro-batches to each operation's result.

T tokens of a stream, M targets beyond the first of each row, N tokens of a datum, K targets of
each position.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from manylora.engine.head_loss import HeadOutput
from manylora.engine.microbatch import MicroBatch
from manylora.engine.plan import Piece, Plan
from manylora.parallel import Axis
from manylora.types import ForwardBackward, ForwardBackwardResult
from manylora.types.data import Array

_NONE = np.zeros(0, np.float32)


@dataclass(slots=True)
class Rows:
    """What came out of one micro-batch, still on the device."""

    batch: MicroBatch
    out: HeadOutput


@dataclass(slots=True)
class PieceResult:
    """Of one piece: each datum's log-probabilities, and the sum of its losses."""

    logprobs: list[Array]
    loss: float


# By the number of the operation and of the piece's first datum in it.
Found: TypeAlias = dict[tuple[int, int], PieceResult]


def found(rows: Iterable[Rows]) -> Found:
    """Cut the micro-batches' outputs up again by piece."""
    pieces: Found = {}
    for row in rows:
        if not row.batch.pieces:
            continue
        # One transfer a micro-batch, after all of them have been started.
        logprobs_T, loss_T = torch.stack([row.out.logprobs_T, row.out.loss_T]).cpu().numpy()
        more_logprobs_M, more_loss_M = _more(row.out)
        for piece, start in zip(row.batch.pieces, row.batch.starts, strict=True):
            ends = start + np.cumsum([len(datum) for datum in piece.data])
            parts = np.split(logprobs_T[start : ends[-1]], ends[:-1] - start)
            loss = float(loss_T[start : ends[-1]].sum(dtype=np.float64))
            first, last = row.batch.more_span(start, int(ends[-1]))
            loss += float(more_loss_M[first:last].sum(dtype=np.float64))
            logprobs = _shaped(parts, piece, more_logprobs_M[first:last])
            pieces[piece.work, piece.first] = PieceResult(logprobs, loss)
    return pieces


def gathered(own: Found, plan: Plan, axis: Axis, device: torch.device) -> Found:
    """What every rank found, by one collective; how much that is, each knows from the plan."""
    lists = [[piece for batch in batches for piece in batch] for batches in plan.batches]
    numbers = max(sum(_numbers(piece) for piece in pieces) for pieces in lists)
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
            part, end = row[end : end + _numbers(piece)], end + _numbers(piece)
            everything[piece.work, piece.first] = _read(piece, part)
    return everything


def results(
    pieces: Found, plan: Plan, runnable: Sequence[tuple[int, ForwardBackward]]
) -> Iterator[tuple[int, ForwardBackwardResult]]:
    """Put each operation's result together, in the order of its data."""
    logprobs: dict[int, list[Array]] = {number: [] for number, _ in runnable}
    losses: dict[int, list[float]] = {number: [] for number, _ in runnable}
    for piece in plan.pieces:
        result = pieces[piece.work, piece.first]
        logprobs[piece.work] += result.logprobs
        losses[piece.work].append(result.loss)
    for number, _ in runnable:
        total = float(sum(losses[number]))
        yield number, ForwardBackwardResult(tuple(logprobs[number]), total, {"loss:sum": total})


def _numbers(piece: Piece) -> int:
    """How many fp32 numbers a piece's result is; a loss, in fp64, takes the place of two."""
    return 2 + sum(datum.loss_inputs["target_tokens"].size for datum in piece.data)


def _read(piece: Piece, row: Array) -> PieceResult:
    loss = float(row[:2].copy().view(np.float64)[0])
    logprobs: list[Array] = []
    start = 2
    for datum in piece.data:
        targets = datum.loss_inputs["target_tokens"]
        logprobs.append(row[start : start + targets.size].reshape(targets.shape))
        start += targets.size
    return PieceResult(logprobs, loss)


def _more(out: HeadOutput) -> tuple[Array, Array]:
    """Log-probabilities and losses of the targets beyond the first."""
    if out.more_logprobs_M is None or out.more_loss_M is None:
        return _NONE, _NONE
    logprobs_M, loss_M = torch.stack([out.more_logprobs_M, out.more_loss_M]).cpu().numpy()
    return logprobs_M, loss_M


def _shaped(parts: Sequence[Array], piece: Piece, others_M: Array) -> list[Array]:
    """Each datum's log-probabilities in the shape of its targets."""
    shaped: list[Array] = []
    start = 0
    for first_N, datum in zip(parts, piece.data, strict=True):
        targets = datum.loss_inputs["target_tokens"]
        if targets.ndim == 1:
            shaped.append(first_N)
            continue
        rows, others = len(targets), targets.shape[1] - 1
        others_NK = others_M[start : start + rows * others].reshape(rows, others)
        shaped.append(np.concatenate([first_N[:, None], others_NK], axis=1))
        start += rows * others
    return shaped
