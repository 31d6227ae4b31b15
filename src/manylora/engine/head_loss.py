"""The head makes log-probabilities, losses and the hidden states' gradient, in chunks.

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
from manylora.engine.split_vocabulary import Mine, Picked, VocabularyPart, WholeVocabulary
from manylora.kernels import SegmentWork, low_rank_on, product
from manylora.lora.routing import RoutingTable
from manylora.losses.cross_entropy import cross_entropy
from manylora.models import Head
from manylora.models.stream import ROW_MULTIPLE, padded_rows


@dataclass(slots=True)
class HeadOutput:
    """A `HeadOutput` is what the head makes of a stream, in fp32 but for the gradient.

    Attributes:
        logprobs_L: log p(target) of each row, by its first target.
        loss_L: loss of each row, by its first target.
        grad_TH: gradient of the sum of all losses by the hidden states; None without a backward.
        more_logprobs_M: of the targets beyond the first; None where there are none.
        more_loss_M: of the same targets.
        entropy_L: of each row whose entropy was asked, in nats; None where there is none.
    """

    logprobs_L: Tensor
    loss_L: Tensor
    grad_TH: Tensor | None
    more_logprobs_M: Tensor | None = None
    more_loss_M: Tensor | None = None
    entropy_L: Tensor | None = None


@dataclass(slots=True)
class _Softmax:
    """A `_Softmax` is a chunk's forward.

    Attributes:
        h_cH: its input.
        mine: the targets, as places in this rank's logits.
        sizes: rows of the chunk, and those that fill it up.
        work: of an adapter on the head.
        shrunk: what the adapter's backward needs.
        dtype: of the head's products.
        cap_cV: the derivative of the softcap, None where there is none.
        exp_cV: exp(logits - max).
        sum_c1: of the exponentials of the whole vocabulary.
        logprobs: of the first targets [c], and of those beyond [m] if there are any.
        more: the targets beyond the first; None where there are none.
        temperature_c1: of each row; None where all are 1.
        entropy_c: in nats; None where it is not asked.
    """

    h_cH: Tensor
    mine: Mine
    sizes: list[int]
    work: list[SegmentWork]
    shrunk: list[Tensor]
    dtype: torch.dtype
    cap_cV: Tensor | None
    exp_cV: Tensor
    sum_c1: Tensor
    logprobs: list[Tensor]
    more: "_More | None"
    temperature_c1: Tensor | None
    entropy_c: Tensor | None


@dataclass(slots=True)
class _More:
    """A `_More` has a chunk's targets beyond the first.

    Attributes:
        span: which of the stream's they are.
        picked: their logits.
        mine: their cells in this rank's logits, row by row.
        weights_m: the weight of each.
        weight_c1: the sum of each row's weights.
    """

    span: slice
    picked: Picked
    mine: Mine
    weights_m: Tensor
    weight_c1: Tensor


class HeadLoss:
    """A `HeadLoss` is the output head with the losses behind it."""

    def __init__(self, head: Head, group: int):
        """`group` is the input group of the head's own site."""
        self.head = head
        self.group = group
        vocab, axis = head.vocab, head.axis
        self.part = WholeVocabulary(vocab) if axis is None else VocabularyPart(axis, vocab)
        capped = head.softcap is not None
        self.chunk_rows = chunk_rows(self.part.longest, head.weight_VH.dtype, capped=capped)
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
        if rows.entropic:
            out.entropy_L = torch.empty_like(logprobs_L)
        for chunk in chunks:
            self._chunk(hidden_TH, rows, inputs, table, chunk, out)
        if out.grad_TH is not None:
            self.part.sum_(out.grad_TH)
        return out

    def _sequence_inputs(
        self, hidden_TH: Tensor, rows: HeadRows, table: RoutingTable, chunks: Sequence[Chunk]
    ) -> dict[str, Tensor]:
        """Compute what losses need of whole data beforehand, by a forward of their trained rows."""
        shares = [share for share in rows.losses if share.loss.sequence_inputs]
        if not shares:
            return {}
        logprobs_L = torch.zeros(rows.total, dtype=torch.float32, device=hidden_TH.device)
        for chunk in chunks:
            if chunk.trained and any(share.within(chunk.start, chunk.stop) for share in shares):
                logprobs_c = self._softmax(hidden_TH, rows, table, chunk).logprobs[0]
                logprobs_L[chunk.rows] = logprobs_c[: len(chunk)]
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
        made = self._softmax(hidden_TH, rows, table, chunk)
        logprobs_c = made.logprobs[0]
        loss_c, slope_c = _losses(rows, inputs_L, chunk, logprobs_c)
        out.logprobs_L[chunk.rows] = logprobs_c[: len(chunk)]
        out.loss_L[chunk.rows] = loss_c[: len(chunk)]
        if out.entropy_L is not None and made.entropy_c is not None:
            out.entropy_L[chunk.rows] = made.entropy_c[: len(chunk)]
        slope_m = _more_losses(made, out)
        if out.grad_TH is not None and chunk.trained:
            grad_cH = self._gradient(made, slope_c, slope_m)[: len(chunk)]
            out.grad_TH.index_copy_(0, rows.rows_L[chunk.rows], grad_cH)

    def _softmax(
        self, hidden_TH: Tensor, rows: HeadRows, table: RoutingTable, chunk: Chunk
    ) -> _Softmax:
        """Run the forward of a chunk."""
        h_cH = _filled_up(hidden_TH.index_select(0, rows.rows_L[chunk.rows]))
        targets_c = _filled_up(rows.targets_L[chunk.rows])
        sizes = [len(chunk), len(h_cH) - len(chunk)]
        work = table.part(chunk.piece, chunk.within, self.group) if chunk.piece is not None else []
        raw_cV, shrunk = self._logits(h_cH, sizes, work)
        logits_cV = self.head.scaled_(raw_cV.float())
        cap_cV = self.head.cap_slope(logits_cV)
        # One exponential serves the normaliser, the log-probabilities and the gradient.
        max_c1 = logits_cV.amax(dim=1, keepdim=True)
        logits_cV = logits_cV.sub_(max_c1)
        temperature_c1 = None
        if (temperature_c := rows.temperatures(chunk)) is not None:
            # As the sampler does. Dividing by one changes nothing.
            temperature_c1 = _filled_up(temperature_c, 1.0).unsqueeze(1)
            logits_cV, max_c1 = logits_cV.div_(temperature_c1), max_c1 / temperature_c1
        mine = self.part.mine(targets_c.unsqueeze(1))
        first = Picked(targets_c, logits_cV.gather(1, mine.place).squeeze(1))
        more = _more_targets(rows, chunk, logits_cV, self.part)
        picked = [first] if more is None else [first, more.picked]
        exp_cV = logits_cV.exp_()
        sum_c1 = exp_cV.sum(dim=1, keepdim=True)
        weighted_c1 = _weighted_logits(exp_cV) if rows.wants_entropy(chunk) else None
        whole = self.part.whole(max_c1, sum_c1, picked, weighted_c1)
        return _Softmax(
            h_cH=h_cH,
            mine=mine,
            sizes=sizes,
            work=work,
            shrunk=shrunk,
            dtype=raw_cV.dtype,
            cap_cV=cap_cV,
            exp_cV=exp_cV,
            sum_c1=whole.sum_c1,
            logprobs=whole.logprobs,
            more=more,
            temperature_c1=temperature_c1,
            entropy_c=whole.entropy_c,
        )

    def _gradient(self, chunk: _Softmax, slope_c: Tensor, slope_m: Tensor | None) -> Tensor:
        """Return the gradient of the chunk's hidden states [c, H]; it uses up `exp_cV`."""
        # d loss / d logits = sum over targets of slope · (onehot(target) - softmax)
        # and the head's factor and 1 / T belong to every slope.
        factor: float | Tensor = self.head.factor
        if chunk.temperature_c1 is not None:
            factor = factor / chunk.temperature_c1
        slope_c1 = total_c1 = slope_c.unsqueeze(1) * factor
        if chunk.more is not None:
            total_c1 = slope_c1 - chunk.more.weight_c1 * factor
        grad_cV = chunk.exp_cV.mul_(-total_c1 / chunk.sum_c1)
        grad_cV.scatter_add_(1, chunk.mine.place, chunk.mine.only(slope_c1))
        if chunk.more is not None and slope_m is not None:
            mine = chunk.more.mine
            if isinstance(factor, Tensor):
                factor = chunk.more.picked.of_rows(factor.view(-1))
            # One dimension is added up in order, also where a row names a token twice.
            grad_cV.view(-1).scatter_add_(0, mine.place, mine.only(slope_m * factor))
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
        """Return uncapped logits [c, V], adapters included, and what their backward needs."""
        raw_cV = product(h_cH, self.head.weight_VH.t(), self.head.bias_V)
        if not work:
            return raw_cV, []
        return raw_cV, self.low_rank.shrink_expand(h_cH, [raw_cV], sizes, work, None)


def _losses(
    rows: HeadRows, inputs_L: Mapping[str, Tensor], chunk: Chunk, logprobs_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Return loss and slope of each row under its own operation's loss."""
    inputs = {name: _filled_up(value[chunk.rows]) for name, value in inputs_L.items()}
    loss_c, slope_c = torch.zeros_like(logprobs_c), torch.zeros_like(logprobs_c)
    for share in rows.losses:
        own_loss_c, own_slope_c = share.loss.function(logprobs_c, inputs, share.settings)
        if share.rows_L is None:
            return own_loss_c, own_slope_c
        rows_c = _filled_up(share.rows_L[chunk.rows])
        loss_c = torch.where(rows_c, own_loss_c, loss_c)
        slope_c = torch.where(rows_c, own_slope_c, slope_c)
    return loss_c, slope_c


def _more_targets(
    rows: HeadRows, chunk: Chunk, logits_cV: Tensor, part: VocabularyPart | WholeVocabulary
) -> _More | None:
    """Return a chunk's targets beyond the first, and their shifted logits."""
    more = rows.more
    first, last = rows.more_span(chunk.start, chunk.stop)
    if more is None or first == last:
        return None
    rows_c = torch.arange(len(chunk), device=logits_cV.device)
    rows_m = rows_c.repeat_interleave(more.counts_L[chunk.rows], output_size=last - first)
    targets_m = more.targets_M[first:last]
    mine = part.mine(targets_m)
    cells_m = rows_m * logits_cV.shape[1] + mine.place
    return _More(
        span=slice(first, last),
        picked=Picked(targets_m, logits_cV.view(-1)[cells_m], rows_m),
        mine=Mine(cells_m, mine.inside),
        weights_m=more.weights_M[first:last],
        weight_c1=_filled_up(more.weight_L[chunk.rows]).unsqueeze(1),
    )


def _more_losses(made: _Softmax, out: HeadOutput) -> Tensor | None:
    """Fill in the chunk's share of `out`; return the slope [m] of each target beyond the first."""
    more = made.more
    if more is None or out.more_logprobs_M is None or out.more_loss_M is None:
        return None
    logprobs_m = made.logprobs[1]
    # The only loss that takes several targets.
    loss_m, slope_m = cross_entropy(logprobs_m, {"weights": more.weights_m}, {})
    out.more_logprobs_M[more.span] = logprobs_m
    out.more_loss_M[more.span] = loss_m
    return slope_m


def _weighted_logits(exp_cV: Tensor) -> Tensor:
    """Return each row's sum [c, 1] of exponentials times their logarithms, which are the logits.

    The logarithms exist for a few rows at a time.
    """
    least = torch.finfo(exp_cV.dtype).tiny  # zero times its logarithm is zero here
    parts = exp_cV.split(ROW_MULTIPLE)
    return torch.cat([part.clamp(min=least).log_().mul_(part).sum(1, True) for part in parts])


def _filled_up(rows: Tensor, value: float = 0.0) -> Tensor:
    """Return the rows with `value` behind them, up to a safe number (see `ROW_MULTIPLE`)."""
    missing = padded_rows(len(rows)) - len(rows)
    if missing == 0:
        return rows
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])
