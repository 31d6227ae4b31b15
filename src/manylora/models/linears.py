"""The linear layers of a base are found here, and which of them read the same tensor.

The architecture is not looked up in a table: a short stream runs once, and the layers that were
given the very same tensor form an input group.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from manylora.models.base import BaseModel
from manylora.models.naming import namings
from manylora.models.splitting import SplitLinear
from manylora.models.stream import PackedStream, packed, padded_rows
from manylora.types.mesh_shape import Split
from manylora.types.weight_forms import Naming


@dataclass(frozen=True, slots=True)
class FoundLinear:
    """A `FoundLinear` is a linear layer of the base with the number of its input group."""

    name: str
    layer: nn.Linear
    group: int
    is_head: bool
    naming: Naming = "leaf"

    @property
    def in_features(self) -> int:
        """The whole layer has this K."""
        layer = self.layer
        return layer.whole_in if isinstance(layer, SplitLinear) else layer.in_features

    @property
    def out_features(self) -> int:
        """The whole layer has this N."""
        layer = self.layer
        return layer.whole_out if isinstance(layer, SplitLinear) else layer.out_features

    @property
    def split(self) -> Split:
        """The layer is split over tp in this way."""
        return self.layer.split if isinstance(self.layer, SplitLinear) else "whole"


@torch.no_grad()
def find_linears(base: BaseModel) -> list[FoundLinear]:
    """Find every linear layer that a token passes, in the order of first calls, the head last."""
    prefix = next(name for name, module in base.model.named_modules() if module is base.backbone)
    names = {module: name for name, module in base.backbone.named_modules(prefix=prefix)}
    called: list[tuple[nn.Linear, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear)
        called.append((module, inputs[0]))

    hooks = [
        module.register_forward_pre_hook(record)
        for module in names
        if isinstance(module, nn.Linear)
    ]
    try:
        zeros_T = torch.zeros(padded_rows(1), dtype=torch.long, device=base.device)
        with packed(PackedStream([1], len(zeros_T))):
            base.hidden(zeros_T, zeros_T)
    finally:
        for hook in hooks:
            hook.remove()
    # `called` holds every input alive, so an id names one tensor.
    groups: dict[int, int] = {}
    found: dict[str, FoundLinear] = {}
    for layer, x in called:
        group = groups.setdefault(id(x), len(groups))
        found.setdefault(names[layer], FoundLinear(names[layer], layer, group, False))
    head = base.model.get_output_embeddings()
    naming = namings(base.model, [head, *(linear.layer for linear in found.values())])
    found = {name: replace(linear, naming=naming[name]) for name, linear in found.items()}
    ordered = sorted(found.values(), key=lambda linear: linear.group)
    return [*ordered, FoundLinear(base.head.name, head, len(groups), True, naming[base.head.name])]
