"""Linear layers that add each token's own adapter to the frozen base.

T tokens, K input features, N output features.

The layers that read one tensor (q, k and v; gate and up) form an input group. The first member
that is called computes the outputs of all of them, the others pick theirs up, and one backward
serves the group: the frozen weights' input gradients and the low-rank terms are summed into one
buffer, in a fixed order, so the result does not depend on which adapters are present.

Under tensor parallelism a rank has parts of the layers, and of the factors: column-wise A whole and
B split, row-wise A split and B whole. What it computes is a summand: of the input's gradient where
the layers are split by columns, of the outputs where they are split by rows. Base and adapters are
summed over the ranks together, once for each input group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manylora.kernels import (
    Columns,
    PackedWeight,
    add_by_row,
    add_product,
    product,
    row_batches,
    shrink_expand,
    shrink_expand_backward,
    write_product,
)
from manylora.lora.adapter import SiteIndex
from manylora.lora.routing import RoutingTable, current_table
from manylora.lora.sites import Site
from manylora.models.linears import FoundLinear
from manylora.models.quantized import plain_type
from manylora.models.splitting import SplitLinear
from manylora.parallel import Axis
from manylora.types import Unsupported
from manylora.types.mesh_shape import Split


class InputGroup:
    """The frozen linear layers that read one tensor."""

    def __init__(self, number: int, layers: list[nn.Linear]):
        self.number = number
        self.layers = layers
        # A leaf that makes autograd visit the group although neither its input nor any
        # registered parameter asks for a gradient, as in the first layer.
        self.anchor = torch.zeros((), requires_grad=True)
        self.split: Split = "whole"
        self.axis: Axis | None = None
        self.columns: Columns | None = None
        # The layers' weights once more, for products of few rows.
        self.packed: list[PackedWeight] = []
        if isinstance(layers[0], SplitLinear):
            self._split_over(layers[0])

    def _split_over(self, layer: SplitLinear) -> None:
        self.split, self.axis = layer.split, layer.axis
        ways = {one.split if isinstance(one, SplitLinear) else "whole" for one in self.layers}
        if len(ways) > 1:
            raise Unsupported(f"layers that read one tensor are split differently: {sorted(ways)}")
        if layer.split == "row":
            self.columns = Columns(layer.axis.share(layer.whole_in)[0], layer.whole_in)

    def outputs(self, x: Tensor, table: RoutingTable) -> list[Tensor | None]:
        """The output of every member, base and adapters together."""
        if torch.is_grad_enabled():
            anchor = self.anchor if table.work(self.number) else None
            ys = _GroupFunction.apply(x, anchor, self, table)
        else:
            ys = self._products(x, table)[0]
        if self.split == "row" and self.axis is not None:
            # Behind the function, whose products are the last that a block's backward reads: where
            # blocks are run again, nobody waits for a sum that is not read. Its gradient is each
            # summand's, so autograd need not know of it.
            for y in ys:
                self.axis.sum_(y.detach())
        return list(ys)

    def pack(self) -> None:
        """Keep the layers' weights a second time, for products of few rows."""
        if not self.packed:
            self.packed = [PackedWeight(layer.weight, layer.bias) for layer in self.layers]

    def _products(self, x: Tensor, table: RoutingTable) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        work = table.work(self.number)
        x_TK = x.reshape(-1, x.shape[-1])
        if table.packed:
            ys = [weight.product(x_TK) for weight in self.packed]
            outputs = tuple(y_TN.view(*x.shape[:-1], y_TN.shape[1]) for y_TN in ys)
        else:
            # Not views, which autograd would not let anybody add to in their place.
            outputs = tuple(x.new_empty(*x.shape[:-1], one.out_features) for one in self.layers)
            ys = [output.view(-1, output.shape[-1]) for output in outputs]
            for y_TN, layer in zip(ys, self.layers, strict=True):
                write_product(y_TN, x_TK, layer.weight.t(), layer.bias)
        if not work:
            return outputs, []
        if table.by_row:
            batches = table.row_batches.get(self.number)
            if batches is None:
                batches = row_batches(x_TK, ys, table.sizes, work)
                table.row_batches[self.number] = batches
            add_by_row(x_TK, ys, batches)
            return outputs, []
        return outputs, shrink_expand(x_TK, ys, table.sizes, work, self.columns)

    def _input_gradient(self, flat: Sequence[Tensor | None]) -> Tensor | None:
        """The base's part of it: the members' products, always in the same order."""
        dx_TK: Tensor | None = None
        for dy_TN, layer in zip(flat, self.layers, strict=True):
            if dy_TN is not None and dx_TK is None:
                dx_TK = product(dy_TN, layer.weight)
            elif dy_TN is not None and dx_TK is not None:
                add_product(dx_TK, dy_TN, layer.weight)
        return dx_TK


class LoRALinear(nn.Module):
    """A frozen linear layer that adds, to each row, the term of that row's adapter.

    It holds no adapter weights: they are read from the routing table. Outside a stream it is
    the base layer.
    """

    def __init__(self, base: nn.Linear, group: InputGroup, position: int):
        super().__init__()
        self.base = base
        self.group = group
        self.position = position

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        table = current_table()
        if table is None:
            return self.base(x)
        if len(self.group.layers) == 1:
            output = self.group.outputs(x, table)[0]
            assert output is not None
            return output
        waiting = table.pending.get(self.group.number)
        if waiting is None or waiting[0] is not x or waiting[1][self.position] is None:
            waiting = table.pending[self.group.number] = (x, self.group.outputs(x, table))
        outputs = waiting[1]
        output, outputs[self.position] = outputs[self.position], None
        assert output is not None
        if not any(o is not None for o in outputs):
            del table.pending[self.group.number]
        return output


class _GroupFunction(torch.autograd.Function):
    """Base products and low-rank terms of one input group."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, anchor: Tensor | None, group: InputGroup, table: RoutingTable
    ) -> tuple[Tensor, ...]:
        ys, shrunk = group._products(x, table)
        ctx.group, ctx.table = group, table
        ctx.set_materialize_grads(False)
        # Nothing but the low-rank gradients reads x again.
        ctx.save_for_backward(*((x, *shrunk) if shrunk else ()))
        ctx.in_shape = x.shape
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        group, table = ctx.group, ctx.table
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx_TK = group._input_gradient(flat) if ctx.needs_input_grad[0] else None
        work = table.work(group.number)
        if work:
            x, *shrunk = ctx.saved_tensors
            x_TK = x.view(-1, x.shape[-1])
            shrink_expand_backward(x_TK, flat, dx_TK, table.sizes, work, shrunk, group.columns)
        if dx_TK is not None and group.split == "column" and group.axis is not None:
            # Each rank has some of the outputs.
            group.axis.sum_(dx_TK)
        return (None if dx_TK is None else dx_TK.view(ctx.in_shape)), None, None, None


def wrap_linears(model: nn.Module, sites: SiteIndex) -> None:
    """Put a `LoRALinear` around every site of `model`, once and for all.

    Adapters come and go without touching the wrapping.

    Raises:
        Unsupported: a site is not a plain `nn.Linear`.
    """
    for number, members in sites.members.items():
        layers = []
        for site in members:
            layer = model.get_submodule(site.name)
            kind = plain_type(layer)
            if not isinstance(layer, nn.Linear) or kind not in (nn.Linear, SplitLinear):
                raise Unsupported(
                    f"{site.name} is a {kind.__name__}; adapters need nn.Linear (of a base whose "
                    "files are quantised, open the original with a `quantization`)"
                )
            layers.append(layer)
        group = InputGroup(number, layers)
        for position, (site, layer) in enumerate(zip(members, layers, strict=True)):
            parent, _, leaf = site.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRALinear(layer, group, position))


def site_of(found: FoundLinear) -> Site:
    """What adapters need to know of a linear layer of the base."""
    return Site(
        found.name,
        found.in_features,
        found.out_features,
        found.group,
        found.is_head,
        found.split,
        found.naming,
    )
