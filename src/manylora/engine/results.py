"""From the outputs of micro-batches to each operation's result.

T tokens of a stream, M targets beyond the first of each row, N tokens of a datum, K targets of
each position.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from manylora.engine.head_loss import HeadOutput
from manylora.engine.microbatch import MicroBatch
from manylora.engine.plan import Piece
from manylora.types import ForwardBackward, ForwardBackwardResult
from manylora.types.data import Array

_NONE = np.zeros(0, np.float32)


@dataclass(slots=True)
class Rows:
    """What came out of one micro-batch, still on the device."""

    batch: MicroBatch
    out: HeadOutput


def results(
    rows: Sequence[Rows], runnable: Sequence[tuple[int, ForwardBackward]]
) -> Iterable[tuple[int, ForwardBackwardResult]]:
    """Cut the micro-batches' outputs up again by operation, in the order of its data."""
    logprobs: dict[int, list[Array]] = {number: [] for number, _ in runnable}
    losses: Mapping[int, list[float]] = {number: [] for number, _ in runnable}
    for row in rows:
        # One transfer a micro-batch, after all of them have been started.
        logprobs_T, loss_T = torch.stack([row.out.logprobs_T, row.out.loss_T]).cpu().numpy()
        more_logprobs_M, more_loss_M = _more(row.out)
        for piece, start in zip(row.batch.pieces, row.batch.starts, strict=True):
            ends = start + np.cumsum([len(datum) for datum in piece.data])
            parts = np.split(logprobs_T[start : ends[-1]], ends[:-1] - start)
            loss = float(loss_T[start : ends[-1]].sum(dtype=np.float64))
            first, last = row.batch.more_span(start, int(ends[-1]))
            loss += float(more_loss_M[first:last].sum(dtype=np.float64))
            logprobs[piece.work] += _shaped(parts, piece, more_logprobs_M[first:last])
            losses[piece.work].append(loss)
    for number, _ in runnable:
        total = float(sum(losses[number]))
        yield number, ForwardBackwardResult(tuple(logprobs[number]), total, {"loss:sum": total})


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
