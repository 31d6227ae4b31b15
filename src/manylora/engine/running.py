"""Forward, loss and backward of one micro-batch.

T tokens of the stream, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from manylora.engine.head_loss import HeadLoss
from manylora.engine.microbatch import MicroBatch
from manylora.engine.results import Rows
from manylora.lora.routing import RoutingTable, routing
from manylora.models import BaseModel, PackedStream, packed


def run(base: BaseModel, head_loss: HeadLoss, batch: MicroBatch, *, backward: bool) -> Rows:
    """Run one micro-batch; the gradients are added to those of its adapters."""
    table = RoutingTable(batch.segments, training=backward)
    stream = PackedStream(batch.lengths, batch.total)
    with torch.set_grad_enabled(backward), routing(table), packed(stream):
        hidden_TH = base.hidden(batch.tokens_T, batch.positions_T)
        out = head_loss(hidden_TH.detach(), batch.head, table, backward=backward)
        # Nothing to do below the head if only the head carries adapters.
        if out.grad_TH is not None and hidden_TH.requires_grad:
            hidden_TH.backward(out.grad_TH)
        out.grad_TH = None  # the rest is kept until all micro-batches have been started
    return Rows(batch, out)


def visit_every_block(base: BaseModel) -> None:
    """Have every backward go down to the first block, whichever adapters there are.

    A backward otherwise ends where no adapter asks for more; with a base in shares, ranks with
    other adapters, or none, would then gather its blocks less often than their neighbours.
    """
    base.model.get_input_embeddings().register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    # The embedding is frozen, so that its output is a leaf.
    return output.requires_grad_() if torch.is_grad_enabled() else output
