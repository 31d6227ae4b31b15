"""Layers that read one tensor are a group to all else: sites, products and a gradient.

Adapters, the engine and sampling know a group by this interface alone, so that another kind of
layers can stand beside `linear.InputGroup`.

T tokens, K input features, N output features.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, autograd, nn

from manylora.kernels import PackedWeight
from manylora.lora.routing import RoutingTable
from manylora.lora.sites import Site

# The input and what the adapters' terms were made by; empty where no adapter acts.
Saved = Sequence[Tensor]


class Group(Protocol):
    """A group is layers of the base that read one tensor, with the adapters on them.

    Attributes:
        number: by which adapters' blocks and the routing table know the group.
        sites: where adapters can act, in the order of the outputs.
        layers: the frozen layer of each site.
        packed: the layers' weights once more, for products of few rows; empty before `pack`.
    """

    number: int
    sites: Sequence[Site]
    layers: Sequence[nn.Linear]
    packed: Sequence[PackedWeight]

    def outputs(self, x: Tensor, table: RoutingTable) -> Sequence[Tensor]:
        """Compute the output of every site, base and adapters together."""

    def products(self, x: Tensor, table: RoutingTable) -> tuple[tuple[Tensor, ...], Saved]:
        """Compute what this rank adds to every output, and what `gradient` needs of it."""

    def gradient(
        self, dys: Sequence[Tensor | None], saved: Saved, table: RoutingTable, *, wanted: bool
    ) -> Tensor | None:
        """Add to the gradients of the adapters' factors.

        Args:
            dys: the gradient of every output; None where nothing used the output.
            saved: what `products` gave.
            wanted: whether the input's gradient is.

        Returns:
            The input's gradient [T, K], None if it is not wanted or nothing used an output.
        """

    def pack(self) -> None:
        """Keep the layers' weights a second time, for products of few rows."""


class GroupFunction(autograd.Function):
    """A `GroupFunction` is a group's products as one operation of autograd."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, anchor: Tensor | None, group: Group, table: RoutingTable
    ) -> tuple[Tensor, ...]:
        """Compute all outputs; `anchor` has autograd come back although x asks for nothing."""
        ys, saved = group.products(x, table)
        ctx.group, ctx.table = group, table
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.in_shape = x.shape
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """Compute the gradient of x; those of the adapters are added where they lie."""
        wanted = ctx.needs_input_grad[0]
        dx_TK = ctx.group.gradient(dys, ctx.saved_tensors, ctx.table, wanted=wanted)
        return (None if dx_TK is None else dx_TK.view(ctx.in_shape)), None, None, None


class Adapted(nn.Module):
    """An adapted module stands in a base's place and has its group compute for it."""

    def __init__(self, group: Group):
        super().__init__()
        self.group = group


def groups_of(model: nn.Module) -> dict[int, Group]:
    """Find the groups of a base by number; there are none before its layers are wrapped."""
    adapted = (module for module in model.modules() if isinstance(module, Adapted))
    return {module.group.number: module.group for module in adapted}
