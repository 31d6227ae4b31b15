"""From hidden states to log-probabilities, losses and the hidden states' gradient, in chunks.

Logits exist for one chunk of rows at a time, so the memory of the loss does not grow with the
stream. The head is frozen: it has no weight gradient, and the gradient of the hidden states is
made in the same pass.

T tokens, c rows of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from manylora.engine.microbatch import MicroBatch
from manylora.kernels import SegmentWork, shrink_expand, shrink_expand_backward
from manylora.lora.routing import RoutingTable
from manylora.models import Head
from manylora.models.stream import ROW_MULTIPLE, padded_rows

# Logits of a chunk: at most this many elements (16 MiB in fp32).
CHUNK_ELEMENTS = 1 << 22


class HeadLoss:
    """The output head with the losses behind it."""

    def __init__(self, head: Head, group: int):
        """`group` is the input group of the head's own site."""
        self.head = head
        self.group = group
        rows = CHUNK_ELEMENTS // head.weight_VH.shape[0]
        self.chunk_rows = max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE)

    @torch.no_grad()
    def __call__(
        self, hidden_TH: Tensor, batch: MicroBatch, table: RoutingTable, *, backward: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the head over a whole stream.

        Returns:
            log p(target) [T] in fp32, loss of each token [T] in fp32, and, with `backward`, the
            gradient of the sum of the losses by the hidden states [T, H].
        """
        logprobs_T = torch.empty(batch.total, dtype=torch.float32, device=hidden_TH.device)
        loss_T = torch.empty_like(logprobs_T)
        grad_TH = torch.empty_like(hidden_TH) if backward else None
        for start, stop in self._chunks(batch, table):
            grad_cH = self._chunk(
                hidden_TH, batch, table, start, stop, logprobs_T, loss_T, backward
            )
            if grad_TH is not None and grad_cH is not None:
                grad_TH[start:stop] = grad_cH[: stop - start]
        return logprobs_T, loss_T, grad_TH

    def _chunks(self, batch: MicroBatch, table: RoutingTable) -> Iterator[tuple[int, int]]:
        """Row ranges. A piece with an adapter on the head is cut on a grid of its own, so that
        its factors' gradients are summed the same way wherever the piece lies."""
        own = {item.segment for item in table.work(self.group)}
        offset, run_start = 0, 0
        ranges: list[tuple[int, int]] = []
        for number, segment in enumerate(batch.segments):
            if number in own:
                ranges += [(run_start, offset), (offset, offset + segment.rows)]
                run_start = offset + segment.rows
            offset += segment.rows
        for first, last in [*ranges, (run_start, offset)]:
            for start in range(first, last, self.chunk_rows):
                yield start, min(start + self.chunk_rows, last)

    def _chunk(
        self,
        hidden_TH: Tensor,
        batch: MicroBatch,
        table: RoutingTable,
        start: int,
        stop: int,
        logprobs_T: Tensor,
        loss_T: Tensor,
        backward: bool,
    ) -> Tensor | None:
        head, rows = self.head, stop - start
        h_cH = _padded(hidden_TH, start, stop)
        targets_c1 = _padded(batch.targets_T, start, stop).unsqueeze(1)
        sizes, work = table.rows(start, stop, self.group)
        sizes = [*sizes, len(h_cH) - rows]
        raw_cV, shrunk = self._logits(h_cH, sizes, work)
        logits_cV = raw_cV.float()
        if head.softcap is not None:
            logits_cV = head.softcap * torch.tanh(logits_cV / head.softcap)
        cap_cV = 1.0 - (logits_cV / head.softcap) ** 2 if head.softcap is not None else None
        # One exponential serves the normaliser, the log-probabilities and the gradient.
        logits_cV = logits_cV.sub_(logits_cV.amax(dim=1, keepdim=True))
        target_c1 = logits_cV.gather(1, targets_c1)
        exp_cV = logits_cV.exp_()
        sum_c1 = exp_cV.sum(dim=1, keepdim=True)
        logprobs_c = (target_c1 - sum_c1.log()).squeeze(1)
        loss_c, slope_c = _losses(batch, start, stop, logprobs_c)
        logprobs_T[start:stop] = logprobs_c[:rows]
        loss_T[start:stop] = loss_c[:rows]
        if not backward:
            return None
        # d loss / d logits = slope · (onehot(target) - softmax)
        slope_c1 = slope_c.unsqueeze(1)
        grad_cV = exp_cV.mul_(-slope_c1 / sum_c1).scatter_add_(1, targets_c1, slope_c1)
        if cap_cV is not None:
            grad_cV.mul_(cap_cV)
        grad_cV = grad_cV.to(raw_cV.dtype)
        if not work:
            return grad_cV @ head.weight_VH
        grad_cH = torch.empty_like(h_cH)
        shrink_expand_backward(h_cH, [grad_cV], grad_cH, sizes, work, shrunk)
        return grad_cH.addmm_(grad_cV, head.weight_VH)

    def _logits(
        self, h_cH: Tensor, sizes: list[int], work: list[SegmentWork]
    ) -> tuple[Tensor, list[Tensor]]:
        """Uncapped logits [c, V] with the adapters on the head, and what their backward needs."""
        head = self.head
        if not work:
            return functional.linear(h_cH, head.weight_VH, head.bias_V), []
        raw_cV = h_cH.new_empty(len(h_cH), head.weight_VH.shape[0])
        shrunk = shrink_expand(h_cH, [raw_cV], [head.bias_V], sizes, work)
        return raw_cV.addmm_(h_cH, head.weight_VH.t()), shrunk


def _losses(batch: MicroBatch, start: int, stop: int, logprobs_c: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and slope of each row under its own operation's loss."""
    inputs = {name: _padded(value, start, stop) for name, value in batch.inputs.items()}
    loss_c, slope_c = torch.zeros_like(logprobs_c), torch.zeros_like(logprobs_c)
    for share in batch.losses:
        own_loss_c, own_slope_c = share.loss.function(logprobs_c, inputs, share.settings)
        if share.rows_T is None:
            return own_loss_c, own_slope_c
        rows_c = _padded(share.rows_T, start, stop)
        loss_c = torch.where(rows_c, own_loss_c, loss_c)
        slope_c = torch.where(rows_c, own_slope_c, slope_c)
    return loss_c, slope_c


def _padded(tensor_T: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop), with zero rows up to a safe number (see `ROW_MULTIPLE`)."""
    rows = tensor_T[start:stop]
    missing = padded_rows(stop - start) - (stop - start)
    if missing == 0:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
