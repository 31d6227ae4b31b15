"""Linear layers add each token's own adapter to the frozen base.

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

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from manylora.kernels import (
    Columns,
    LowRank,
    PackedWeight,
    add_by_row,
    add_product,
    low_rank_on,
    product,
    row_batches,
    write_product,
)
from manylora.lora.groups import Adapted, Group, GroupFunction, Saved
from manylora.lora.routing import RoutingTable, current_table
from manylora.lora.sites import Site
from manylora.models.linears import FoundLinear
from manylora.models.quantized import plain_type
from manylora.models.splitting import SplitLinear
from manylora.parallel import Axis
from manylora.types import Unsupported
from manylora.types.mesh_shape import Split


class InputGroup:
    """An input group is the frozen linear layers that read one tensor; see `Group`."""

    def __init__(
        self, number: int, sites: Sequence[Site], layers: Sequence[nn.Linear], low_rank: LowRank
    ):
        self.number = number
        self.sites = sites
        self.layers = layers
        self.low_rank = low_rank
        # A leaf that makes autograd visit the group although neither its input nor any
        # registered parameter asks for a gradient, as in the first layer.
        self.anchor = torch.zeros((), requires_grad=True)
        self.split: Split = "whole"
        self.axis: Axis | None = None
        self.columns: Columns | None = None
        self.packed: Sequence[PackedWeight] = []
        if isinstance(layers[0], SplitLinear):
            self._split_over(layers[0])

    def _split_over(self, layer: SplitLinear) -> None:
        self.split, self.axis = layer.split, layer.axis
        ways = {one.split if isinstance(one, SplitLinear) else "whole" for one in self.layers}
        if len(ways) > 1:
            raise Unsupported(f"layers that read one tensor are split differently: {sorted(ways)}")
        if layer.split == "row":
            self.columns = Columns(layer.axis.share(layer.whole_in)[0], layer.whole_in)

    def outputs(self, x: Tensor, table: RoutingTable) -> Sequence[Tensor]:
        """Compute the output of every member, base and adapters together."""
        if torch.is_grad_enabled():
            anchor = self.anchor if table.work(self.number) else None
            ys = GroupFunction.apply(x, anchor, self, table)
        else:
            ys = self.products(x, table)[0]
        if self.split == "row" and self.axis is not None:
            # Behind the function, whose products are the last that a block's backward reads: where
            # blocks are run again, nothing waits for a sum that is not read. Its gradient is each
            # summand's, so autograd need not know of it.
            for y in ys:
                self.axis.sum_(y.detach())
        return ys

    def pack(self) -> None:
        """Keep the layers' weights a second time, for products of few rows."""
        if not self.packed:
            self.packed = [PackedWeight(layer.weight, layer.bias) for layer in self.layers]

    def products(self, x: Tensor, table: RoutingTable) -> tuple[tuple[Tensor, ...], Saved]:
        """Compute the members' outputs, or this rank's summands, and what `gradient` needs."""
        work = table.work(self.number)
        x_TK = x.reshape(-1, x.shape[-1])
        if table.packed:
            ys = [weight.product(x_TK) for weight in self.packed]
            outputs = tuple(y_TN.view(*x.shape[:-1], y_TN.shape[1]) for y_TN in ys)
        else:
            # Not views, which autograd would not let anything add to in their place.
            outputs = tuple(x.new_empty(*x.shape[:-1], one.out_features) for one in self.layers)
            ys = [output.view(-1, output.shape[-1]) for output in outputs]
            for y_TN, layer in zip(ys, self.layers, strict=True):
                write_product(y_TN, x_TK, layer.weight.t(), layer.bias)
        if not work:
            return outputs, ()
        if table.by_row:
            batches = table.row_batches.get(self.number)
            if batches is None:
                batches = row_batches(x_TK, ys, table.sizes, work)
                table.row_batches[self.number] = batches
            add_by_row(x_TK, ys, batches)
            return outputs, ()
        shrunk = self.low_rank.shrink_expand(x_TK, ys, table.sizes, work, self.columns)
        # Nothing but the low-rank gradients reads x again.
        return outputs, (x, *shrunk)

    def gradient(
        self, dys: Sequence[Tensor | None], saved: Saved, table: RoutingTable, *, wanted: bool
    ) -> Tensor | None:
        """Compute the input's gradient [T, K] if it is wanted, and add to those of the factors."""
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx_TK = self._input_gradient(flat) if wanted else None
        if saved:
            x, *shrunk = saved
            x_TK, work = x.view(-1, x.shape[-1]), table.work(self.number)
            self.low_rank.shrink_expand_backward(
                x_TK, flat, dx_TK, table.sizes, work, shrunk, self.columns
            )
        if dx_TK is not None and self.split == "column" and self.axis is not None:
            # Each rank has some of the outputs.
            self.axis.sum_(dx_TK)
        return dx_TK

    def _input_gradient(self, flat: Sequence[Tensor | None]) -> Tensor | None:
        """Sum the members' products, the base's part of the gradient, always in the same order."""
        dx_TK: Tensor | None = None
        for dy_TN, layer in zip(flat, self.layers, strict=True):
            if dy_TN is not None and dx_TK is None:
                dx_TK = product(dy_TN, layer.weight)
            elif dy_TN is not None and dx_TK is not None:
                add_product(dx_TK, dy_TN, layer.weight)
        return dx_TK


class LoRALinear(Adapted):
    """A `LoRALinear` is a frozen linear layer that adds to each row the term of its adapter.

    It holds no adapter weights: they are read from the routing table. Outside a stream it is
    the base layer.
    """

    def __init__(self, base: nn.Linear, group: Group, position: int):
        super().__init__(group)
        self.base = base
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
        group, position = self.group, self.position
        if len(group.sites) == 1:
            return group.outputs(x, table)[0]
        waiting = table.pending.get(group.number)
        if waiting is None or waiting[0] is not x or position not in waiting[1]:
            waiting = table.pending[group.number] = (x, dict(enumerate(group.outputs(x, table))))
        outputs = waiting[1]
        output = outputs.pop(position)
        if not outputs:
            del table.pending[group.number]
        return output


def wrap_linears(model: nn.Module, sites: Iterable[Site]) -> list[Group]:
    """Put a `LoRALinear` around every site of `model`, once and for all.

    Adapters come and go without touching the wrapping.

    Returns:
        The input groups, in the order of their first sites.

    Raises:
        Unsupported: a site is not a plain `nn.Linear`.
    """
    grouped: dict[int, list[Site]] = {}
    for site in sites:
        grouped.setdefault(site.group, []).append(site)
    low_rank = low_rank_on(next(model.parameters()).device)
    groups: list[Group] = []
    for number, members in grouped.items():
        layers = [_plain_linear(model, site) for site in members]
        group = InputGroup(number, members, layers, low_rank)
        for position, (site, layer) in enumerate(zip(members, layers, strict=True)):
            model.set_submodule(site.name, LoRALinear(layer, group, position))
        groups.append(group)
    return groups


def _plain_linear(model: nn.Module, site: Site) -> nn.Linear:
    layer = model.get_submodule(site.name)
    kind = plain_type(layer)
    if not isinstance(layer, nn.Linear) or kind not in (nn.Linear, SplitLinear):
        raise Unsupported(
            f"{site.name} is a {kind.__name__}; adapters need nn.Linear (of a base whose "
            "files are quantised, open the original with a `quantization`)"
        )
    return layer


def site_of(found: FoundLinear) -> Site:
    """Describe a linear layer of the base as adapters need it."""
    size = found.in_features, found.out_features
    return Site(found.name, *size, found.group, found.is_head, found.split, found.naming)
