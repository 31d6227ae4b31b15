"""A weight of a base in parts is put together again.

N output features, K input features.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from manylora.models.quantized import is_quantized, kept
from manylora.models.splitting import SplitLinear
from manylora.parallel import Axis, Mesh


def whole_weight(layer: nn.Linear, mesh: Mesh) -> Tensor:
    """Return a linear layer's frozen weight [N, K], on every rank; this is a collective."""
    if is_quantized(layer):
        whole, owner = kept(layer)
        weight: Tensor = whole(*(_own(each, mesh) for each in owner.parameters(recurse=False)))
    else:
        weight = _own(layer.weight, mesh)
    if not isinstance(layer, SplitLinear):
        return weight
    if layer.split == "column":
        return _joined(weight, 0, layer.whole_out, mesh.tp)
    return _joined(weight, 1, layer.whole_in, mesh.tp)


def _own(parameter: Tensor, mesh: Mesh) -> Tensor:
    """Return what is a rank's own but for `fully_shard`, which shares out its rows."""
    if isinstance(parameter, DTensor):
        return _joined(parameter.to_local(), 0, parameter.shape[0], mesh.dp)
    return parameter


def _joined(part: Tensor, dim: int, count: int, axis: Axis) -> Tensor:
    """Put shares of `count` things along a dimension (see `parallel.share`) side by side."""
    if axis.size == 1:
        return part
    own = part.movedim(dim, 0)
    padded = own.new_zeros(-(-count // axis.size), *own.shape[1:])
    padded[: len(own)] = own
    return axis.gather(padded).flatten(0, 1)[:count].movedim(0, dim)
