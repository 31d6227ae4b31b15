"""A rank has its place in the mesh, and collectives along each axis.

Every rank of an axis calls the same collectives in the same order with tensors of the same shape.

On CPU a sum is formed in the order of the ranks. The vendor's ring adds up each part of a tensor
in another order, so that an element's bits would depend on where it lies and on what else is sent.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from manylora.parallel.traffic import Traffic
from manylora.types.errors import ConfigError
from manylora.types.mesh_shape import MeshShape

# Below this many bytes one message each way costs less than two smaller ones.
SMALL_BYTES = 1 << 16

# torch 2.13 gave it a new name, and warns of the old one.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis is the ranks that differ from this one along it only, this one included.

    With one rank no collective is issued.

    Attributes:
        name: `dp`, `tp`, or `world` for the whole mesh.
        size: ranks.
        index: this one's place among them.
        group: None where there is one rank.
        traffic: counts what is sent.
    """

    name: str
    size: int
    index: int
    group: dist.ProcessGroup | None
    traffic: Traffic

    def share(self, count: int) -> tuple[int, int]:
        """Say where this rank's part of `count` things begins and ends; see `share`."""
        return share(count, self.size, self.index)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; each of them has the same bits."""
        if self.size == 1 or not tensor.numel():
            return tensor
        # Two numbers have the same sum in either order.
        if not tensor.is_cpu or (self.size == 2 and tensor.dtype == torch.float32):
            self._count("sum", 2 * tensor.nbytes * (self.size - 1) // self.size)
            if tensor.is_contiguous():
                dist.all_reduce(tensor, group=self.group)
                return tensor
            whole = tensor.contiguous()
            dist.all_reduce(whole, group=self.group)
            return tensor.copy_(whole)
        return tensor.copy_(self._sum_in_order(tensor.reshape(-1)).view(tensor.shape))

    def max_(self, tensor: Tensor) -> Tensor:
        """Take the largest over the ranks, in place."""
        if self.size == 1 or not tensor.numel():
            return tensor
        self._count("max", 2 * tensor.nbytes * (self.size - 1) // self.size)
        whole = tensor.contiguous()
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=self.group)
        return tensor if whole is tensor else tensor.copy_(whole)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor, [size, *shape], in the order of the ranks."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        self._count("gather", tensor.nbytes * (self.size - 1))
        return self._gather(tensor)

    def exchange(self, tensor: Tensor) -> Tensor:
        """Send row i of `tensor` [size, n] to rank i; row i of the result came from rank i."""
        if self.size == 1:
            return tensor
        self._count("exchange", tensor.nbytes * (self.size - 1) // self.size)
        return self._exchange(tensor)

    def _gather(self, tensor: Tensor) -> Tensor:
        parts = tensor.new_empty(self.size, *tensor.shape)
        gather_into(parts.view(-1), tensor.reshape(-1), group=self.group)
        return parts

    def _exchange(self, tensor: Tensor) -> Tensor:
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, tensor.contiguous(), group=self.group)
        return received

    def _sum_in_order(self, flat: Tensor) -> Tensor:
        """Sum a vector; the order of addition is the same whichever way it is sent."""
        size, count = self.size, len(flat)
        if flat.nbytes <= SMALL_BYTES:
            self._count("sum", flat.nbytes * (size - 1))
            return _added(self._gather(flat))
        # As many bytes as a ring sends.
        self._count("sum", 2 * flat.nbytes * (size - 1) // size)
        share = -(-count // size)
        padded = flat if share * size == count else flat.new_zeros(share * size)
        if padded is not flat:
            padded[:count] = flat
        own = _added(self._exchange(padded.view(size, share)))
        return self._gather(own).view(-1)[:count]

    def _count(self, kind: str, num_bytes: int) -> None:
        self.traffic.count(f"{self.name}.{kind}", num_bytes)


class Mesh:
    """A mesh is this rank's place among the others.

    Attributes:
        shape: ranks along each axis.
        world_rank: this rank's number, dp index · tp + tp index; the leader's is 0.
        axes: by name.
        dp: the axis along which tokens are dealt out.
        tp: the axis along which matrices are split.
        world: all ranks as one axis.
        device_mesh: torch's own, for `fully_shard`; None where there is one rank.
        traffic: what this rank has sent along all axes.
    """

    def __init__(self, shape: MeshShape, world_rank: int, device_mesh: DeviceMesh | None):
        self.shape = shape
        self.world_rank = world_rank
        self.device_mesh = device_mesh
        self.traffic = Traffic()
        self.axes: dict[str, Axis] = {}
        rest = world_rank
        for name, size in reversed(shape.axes.items()):
            rest, index = divmod(rest, size)
            group = device_mesh.get_group(name) if size > 1 and device_mesh is not None else None
            self.axes[name] = Axis(name, size, index, group, self.traffic)
        self.dp, self.tp = self.axes["dp"], self.axes["tp"]
        everyone = dist.group.WORLD if shape.size > 1 else None
        self.world = Axis("world", shape.size, world_rank, everyone, self.traffic)

    @classmethod
    def join(cls, shape: MeshShape, device: torch.device | str) -> "Mesh":
        """Take this process's place; torch.distributed is initialised unless there is one rank.
        Raises ConfigError: another number of processes than the mesh has ranks."""
        assert shape.replicas == 1, "a mesh is one replica's"
        started = dist.get_world_size() if dist.is_initialized() else 1
        if started != shape.size:
            raise ConfigError(
                f"mesh {shape}: it has {shape.size} ranks, but {started} were started; start as "
                "many as dp · tp"
            )
        if shape.size == 1:
            return cls(shape, 0, None)
        kind = torch.device(device).type
        names, sizes = zip(*shape.axes.items(), strict=True)
        device_mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
        return cls(shape, dist.get_rank(), device_mesh)

    @property
    def is_leader(self) -> bool:
        """This rank's answers are the ones that are read."""
        return self.world_rank == 0


def _added(parts: Tensor) -> Tensor:
    """Sum the rows [size, n], one after the other, in fp32 or wider."""
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def share(count: int, size: int, index: int) -> tuple[int, int]:
    """Say where share `index` of `count` things begins and ends; the first are equally long.

    As `torch.chunk` cuts, and with it `fully_shard`: the last ones may be shorter, or empty.
    """
    length = -(-count // size)
    return min(index * length, count), min((index + 1) * length, count)
