"""From hidden states to log-probabilities, losses and the hidden states' gradient, in chunks.

The head runs on the rows that are asked for, and backwards on the trained ones alone (see
`head_rows`). Logits exist for one chunk of them at a time, so the memory of the loss does not grow
with the stream. The head is frozen: it has no weight gradient, and the gradient of the hidden
states is made in the same pass. Under tensor parallelism a rank forms the logits of its own part of
the vocabulary only (see `vocabulary`).

T tokens, L rows of the head, c rows of a chunk, H hidden size, V vocabulary; M targets beyond the
first of each row, m of them in a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.engine.head_chunks import chunk_rows
from manylora.engine.head_rows import Chunk, HeadRows
from manylora.engine.split_vocabulary import VocabularyPart
from manylora.kernels import SegmentWork, low_rank_on, product
from manylora.lora.routing import RoutingTable
from manylora.losses.cross_entropy import cross_entropy
from manylora.models import Head
from manylora.models.stream import padded_rows


@dataclass(slots=True)
class HeadOutput:
    """What the head gives back for a stream, in fp32 but for the gradient.

    Attributes:
        logprobs_L: log p(target) of each row, by its first target.
        loss_L: loss of each row, by its first target.
        grad_TH: gradient of the sum of all losses by the hidden states; None without a backward.
        more_logprobs_M: of the targets beyond the first; None where there are none.
        more_loss_M: of the same targets.
    """

    logprobs_L: Tensor
    loss_L: Tensor
    grad_TH: Tensor | None
    more_logprobs_M: Tensor | None = None
    more_loss_M: Tensor | None = None


@dataclass(slots=True)
class _Softmax:
    """A chunk's forward: its input, what the adapters' backward needs, and exp(logits - max).

    `cap_cV` is the derivative of the softcap, None where there is none. The targets are places in
    this rank's logits; `mine_c1` tells which of them are its own, None if all are.
    """

    h_cH: Tensor
    targets_c1: Tensor
    mine_c1: Tensor | None
    sizes: list[int]
    work: list[SegmentWork]
    shrunk: list[Tensor]
    dtype: torch.dtype
    cap_cV: Tensor | None
    exp_cV: Tensor
    sum_c1: Tensor
    logprobs_c: Tensor
    more: "_More | None"


@dataclass(slots=True)
class _More:
    """A chunk's targets beyond the first: where they are in its logits, and what came of them.

    `mine_m` tells which lie in this rank's logits, None if all do.
    """

    start: int
    stop: int
    rows_m: Tensor
    targets_m: Tensor
    cells_m: Tensor
    mine_m: Tensor | None
    weights_m: Tensor
    weight_c1: Tensor
    logprobs_m: Tensor


class HeadLoss:
    """The output head with the losses behind it."""

    def __init__(self, head: Head, group: int):
        """`group` is the input group of the head's own site."""
        self.head = head
        self.group = group
        self.part = None if head.axis is None else VocabularyPart(head.axis, head.vocab)
        words = head.vocab if self.part is None else self.part.longest
        capped = head.softcap is not None
        self.chunk_rows = chunk_rows(words, head.weight_VH.dtype, capped=capped)
        self.low_rank = low_rank_on(head.weight_VH.device)

    @torch.no_grad()
    def __call__(
        self, hidden_TH: Tensor, rows: HeadRows, table: RoutingTable, *, backward: bool
    ) -> HeadOutput:
        """Run the head over the rows of a stream that are asked for."""
        with self.head.gathered():
            return self._run(hidden_TH, rows, table, backward=backward)

    def _run(
        self, hidden_TH: Tensor, rows: HeadRows, table: RoutingTable, *, backward: bool
    ) -> HeadOutput:
        apart = {item.segment for item in table.work(self.group)}
        chunks = list(rows.chunks(apart, self.chunk_rows))
        inputs = {**rows.inputs, **self._sequence_inputs(hidden_TH, rows, table, chunks)}
        logprobs_L = torch.empty(rows.total, dtype=torch.float32, device=hidden_TH.device)
        out = HeadOutput(logprobs_L, torch.empty_like(logprobs_L), None)
        if backward:
            out.grad_TH = torch.zeros_like(hidden_TH)
        if rows.more is not None:
            out.more_logprobs_M = torch.empty_like(rows.more.weights_M)
            out.more_loss_M = torch.empty_like(rows.more.weights_M)
        for chunk in chunks:
            self._chunk(hidden_TH, rows, inputs, table, chunk, out)
        if self.part is not None and out.grad_TH is not None:
            self.part.axis.sum_(out.grad_TH)
        return out

    def _sequence_inputs(
        self,
        hidden_TH: Tensor,
        rows: HeadRows,
        table: RoutingTable,
        chunks: Sequence[Chunk],
    ) -> dict[str, Tensor]:
        """What losses need to know of whole data beforehand, by a forward of their trained rows."""
        shares = [share for share in rows.losses if share.loss.sequence_inputs]
        if not shares:
            return {}
        logprobs_L = torch.zeros(rows.total, dtype=torch.float32, device=hidden_TH.device)
        for chunk in chunks:
            start, stop = chunk.start, chunk.stop
            if chunk.trained and any(share.within(start, stop) for share in shares):
                logprobs_c = self._softmax(hidden_TH, rows, table, chunk).logprobs_c
                logprobs_L[start:stop] = logprobs_c[: len(chunk)]
        return {
            name: make(logprobs_L, rows.inputs, rows.lengths)
            for share in shares
            for name, make in share.loss.sequence_inputs.items()
        }

    def _chunk(
        self,
        hidden_TH: Tensor,
        rows: HeadRows,
        inputs_L: Mapping[str, Tensor],
        table: RoutingTable,
        chunk: Chunk,
        out: HeadOutput,
    ) -> None:
        """Fill in the chunk's part of `out`."""
        start, stop = chunk.start, chunk.stop
        made = self._softmax(hidden_TH, rows, table, chunk)
        loss_c, slope_c = _losses(rows, inputs_L, start, stop, made.logprobs_c)
        out.logprobs_L[start:stop] = made.logprobs_c[: len(chunk)]
        out.loss_L[start:stop] = loss_c[: len(chunk)]
        slope_m = _more_losses(made.more, out)
        if out.grad_TH is not None and chunk.trained:
            grad_cH = self._gradient(made, slope_c, slope_m)[: len(chunk)]
            out.grad_TH.index_copy_(0, rows.rows_L[start:stop], grad_cH)

    def _softmax(
        self, hidden_TH: Tensor, rows: HeadRows, table: RoutingTable, chunk: Chunk
    ) -> _Softmax:
        """The forward of a chunk."""
        head, start, stop = self.head, chunk.start, chunk.stop
        h_cH = _filled_up(hidden_TH.index_select(0, rows.rows_L[start:stop]))
        targets_c1 = _padded(rows.targets_L, start, stop).unsqueeze(1)
        sizes = [len(chunk), len(h_cH) - len(chunk)]
        work = table.part(chunk.piece, chunk.within, self.group) if chunk.piece is not None else []
        raw_cV, shrunk = self._logits(h_cH, sizes, work)
        logits_cV = head.scaled_(raw_cV.float())
        cap_cV = head.cap_slope(logits_cV)
        # One exponential serves the normaliser, the log-probabilities and the gradient.
        max_c1 = logits_cV.amax(dim=1, keepdim=True)
        logits_cV = logits_cV.sub_(max_c1)
        mine = None if self.part is None else self.part.mine(targets_c1)
        places_c1 = targets_c1 if mine is None else mine.place
        target_c1 = logits_cV.gather(1, places_c1)
        more = _gathered(rows, start, stop, logits_cV, self.part)
        exp_cV = logits_cV.exp_()
        sum_c1 = exp_cV.sum(dim=1, keepdim=True)
        if self.part is not None:
            sum_c1, log_c1, target_c1 = self._completed(
                self.part, max_c1, sum_c1, target_c1, targets_c1, more
            )
        else:
            log_c1 = sum_c1.log()
        logprobs_c = (target_c1 - log_c1).squeeze(1)
        if more is not None:
            more.logprobs_m -= log_c1.view(-1)[more.rows_m]
        return _Softmax(
            h_cH=h_cH,
            targets_c1=places_c1,
            mine_c1=None if mine is None else mine.inside,
            sizes=sizes,
            work=work,
            shrunk=shrunk,
            dtype=raw_cV.dtype,
            cap_cV=cap_cV,
            exp_cV=exp_cV,
            sum_c1=sum_c1,
            logprobs_c=logprobs_c,
            more=more,
        )

    @staticmethod
    def _completed(
        part: VocabularyPart,
        max_c1: Tensor,
        sum_c1: Tensor,
        target_c1: Tensor,
        targets_c1: Tensor,
        more: _More | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum, its logarithm and the targets' logits of the whole vocabulary; and `more`'s."""
        nothing = targets_c1.new_empty(0)
        more_m, rows_m, targets_m = (
            (max_c1.new_empty(0), nothing, nothing)
            if more is None
            else (more.logprobs_m, more.rows_m, more.targets_m)
        )
        whole = part.whole(max_c1, sum_c1, target_c1, targets_c1, more_m, rows_m, targets_m)
        if more is not None:
            more.logprobs_m = whole.more_m
        return whole.sum_c1, whole.log_c1, whole.target_c1

    def _gradient(self, chunk: _Softmax, slope_c: Tensor, slope_m: Tensor | None) -> Tensor:
        """The gradient of the chunk's hidden states [c, H]; uses up `exp_cV`."""
        # d loss / d logits = sum over targets of slope · (onehot(target) - softmax)
        # and the head's factor belongs to every slope.
        factor = self.head.factor
        slope_c1 = total_c1 = slope_c.unsqueeze(1) * factor
        if chunk.more is not None:
            total_c1 = slope_c1 - chunk.more.weight_c1 * factor
        grad_cV = chunk.exp_cV.mul_(-total_c1 / chunk.sum_c1)
        if chunk.mine_c1 is not None:
            slope_c1 = slope_c1 * chunk.mine_c1
        grad_cV.scatter_add_(1, chunk.targets_c1, slope_c1)
        if chunk.more is not None and slope_m is not None:
            slope_m = slope_m * factor
            if chunk.more.mine_m is not None:
                slope_m = slope_m * chunk.more.mine_m
            # One dimension is added up in order, also where a row names a token twice.
            grad_cV.view(-1).scatter_add_(0, chunk.more.cells_m, slope_m)
        if chunk.cap_cV is not None:
            grad_cV.mul_(chunk.cap_cV)
        grad_cV = grad_cV.to(chunk.dtype)
        grad_cH = product(grad_cV, self.head.weight_VH)
        if chunk.work:
            self.low_rank.shrink_expand_backward(
                chunk.h_cH, [grad_cV], grad_cH, chunk.sizes, chunk.work, chunk.shrunk, None
            )
        return grad_cH

    def _logits(
        self, h_cH: Tensor, sizes: list[int], work: list[SegmentWork]
    ) -> tuple[Tensor, list[Tensor]]:
        """Uncapped logits [c, V] with the adapters on the head, and what their backward needs."""
        raw_cV = product(h_cH, self.head.weight_VH.t(), self.head.bias_V)
        if not work:
            return raw_cV, []
        return raw_cV, self.low_rank.shrink_expand(h_cH, [raw_cV], sizes, work, None)


def _losses(
    rows: HeadRows, inputs_L: Mapping[str, Tensor], start: int, stop: int, logprobs_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and slope of each row under its own operation's loss."""
    inputs = {name: _padded(value, start, stop) for name, value in inputs_L.items()}
    loss_c, slope_c = torch.zeros_like(logprobs_c), torch.zeros_like(logprobs_c)
    for share in rows.losses:
        own_loss_c, own_slope_c = share.loss.function(logprobs_c, inputs, share.settings)
        if share.rows_L is None:
            return own_loss_c, own_slope_c
        rows_c = _padded(share.rows_L, start, stop)
        loss_c = torch.where(rows_c, own_loss_c, loss_c)
        slope_c = torch.where(rows_c, own_slope_c, slope_c)
    return loss_c, slope_c


def _gathered(
    rows: HeadRows, start: int, stop: int, logits_cV: Tensor, part: VocabularyPart | None
) -> _More | None:
    """The shifted logits of a chunk's targets beyond the first, as `logprobs_m` to be completed."""
    more = rows.more
    first, last = rows.more_span(start, stop)
    if more is None or first == last:
        return None
    rows_c = torch.arange(stop - start, device=logits_cV.device)
    rows_m = rows_c.repeat_interleave(more.counts_L[start:stop], output_size=last - first)
    targets_m = more.targets_M[first:last]
    mine = None if part is None else part.mine(targets_m)
    cells_m = rows_m * logits_cV.shape[1] + (targets_m if mine is None else mine.place)
    weight_c1 = _padded(more.weight_L, start, stop).unsqueeze(1)
    weights_m = more.weights_M[first:last]
    return _More(
        first,
        last,
        rows_m,
        targets_m,
        cells_m,
        None if mine is None else mine.inside,
        weights_m,
        weight_c1,
        logits_cV.view(-1)[cells_m],
    )


def _more_losses(more: _More | None, out: HeadOutput) -> Tensor | None:
    """Fill in the chunk's share of `out`; the slope [m] of each target beyond the first."""
    if more is None or out.more_logprobs_M is None or out.more_loss_M is None:
        return None
    # The only loss that takes several targets.
    loss_m, slope_m = cross_entropy(more.logprobs_m, {"weights": more.weights_m}, {})
    out.more_logprobs_M[more.start : more.stop] = more.logprobs_m
    out.more_loss_M[more.start : more.stop] = loss_m
    return slope_m


def _padded(tensor_L: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop), filled up."""
    return _filled_up(tensor_L[start:stop])


def _filled_up(rows: Tensor) -> Tensor:
    """With zero rows up to a safe number (see `ROW_MULTIPLE`)."""
    missing = padded_rows(len(rows)) - len(rows)
    if missing == 0:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
