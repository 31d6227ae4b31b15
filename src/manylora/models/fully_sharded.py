"""A frozen base is shared out over the data-parallel axis: `fully_shard` for each block.

A block's parameters are gathered before its forward and its backward and dropped afterwards. There
are no gradients to reduce. Embedding and head are gathered by those who read them, because losses
read the head outside any module; what lies in neither (the last norm) is whole everywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from manylora.parallel import Mesh, Traffic
from manylora.parallel.mesh import gather_into
from manylora.types import Unsupported


class Shared:
    """A `Shared` is a module's parameters, gathered while something uses them.

    `sharded` is None where every rank holds them whole.
    """

    def __init__(self, sharded: FSDPModule | None = None):
        self._sharded = sharded
        self._users = 0

    def take(self) -> None:
        """Gather, unless they are; every rank of the axis does so at the same point."""
        if self._sharded is not None and not self._users:
            self._sharded.unshard()
        self._users += 1

    def leave(self) -> None:
        """Drop what was gathered once nothing uses it."""
        self._users -= 1
        if self._sharded is not None and not self._users:
            self._sharded.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While this is open, the module's parameters are whole."""
        self.take()
        try:
            yield
        finally:
            self.leave()


class Unit(nn.Module):
    """A unit is modules whose parameters are gathered together; it is never called."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(modules)


def share_out(model: Any, mesh: Mesh) -> Shared:
    """Give each rank of `dp` its share of a model's parameters.

    Args:
        model: a frozen causal LM, whose values are still to come (meta) or are there.

    Returns:
        The output head.

    Raises:
        Unsupported: transformers does not say which modules are the model's blocks.
    """
    if mesh.dp.size == 1 or mesh.device_mesh is None:
        return Shared()
    along = mesh.device_mesh["dp"]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    blocks = [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or ())]
    if not blocks:
        raise Unsupported(
            f"{type(model).__name__} does not name its blocks (`_no_split_modules`), so it cannot "
            "be shared out over dp; use dp=1"
        )
    units: list[Any] = [Unit(embedding, head)] if tied else [Unit(embedding), Unit(head)]
    gather = CountedGather(mesh.traffic)
    for module in (*units, *blocks):
        shared: Any = fully_shard(module, mesh=along, reshard_after_forward=True)
        shared.set_custom_all_gather(gather)
    rest = {p for p in model.parameters() if not hasattr(p, "to_local")}
    units_own = {p for unit in units for p in unit.parameters()}
    fully_shard(model.base_model, mesh=along, ignored_params=rest | units_own)
    table = Shared(units[0])
    embedding.register_forward_pre_hook(lambda *_: table.take(), prepend=True)
    embedding.register_forward_hook(lambda *_: table.leave())
    return table if tied else Shared(units[1])


def forget_forward(backbone: nn.Module) -> None:
    """Drop what a forward noted for the backward, where no backward follows."""
    if isinstance(backbone, FSDPModule):
        backbone.reset_iter_state()


class CountedGather:
    """A `CountedGather` is FSDP's gather, counted as `dp.blocks`."""

    def __init__(self, traffic: Traffic):
        self._traffic = traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the memory that is gathered from or into."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather every rank's shares."""
        self._traffic.count("dp.blocks", input_tensor.nbytes * (group.size() - 1))
        return gather_into(output_tensor, input_tensor, group, async_op)
