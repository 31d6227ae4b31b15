"""A base is split over the tensor-parallel axis before it has any values.

K input features, N output features, V vocabulary, H hidden size.

    column    q, k, v, gate, up, head    W [N/tp, K]    each rank has some of the outputs
    row       o, down                    W [N, K/tp]    each rank adds to all of the outputs

The embedding and the head are split by vocabulary; the last rank's part may be shorter. What is
split how is the family's own plan in transformers (`base_model_tp_plan`).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manylora.parallel import Axis, share
from manylora.types import Unsupported
from manylora.types.mesh_shape import MeshShape, Split

KINDS: dict[str, Split] = {"colwise": "column", "rowwise": "row"}
# Modules that every rank holds; the remark concerns gradients that a frozen base has not.
WHOLE = {"replicated_with_grad_allreduce"}
# An embedding, which is split in every family, whether its plan says so or not.
BY_VOCABULARY = "embedding_rowwise"


class SplitLinear(nn.Linear):
    """A `SplitLinear` is a rank's part of a layer; it gives some outputs (column) or all (row).

    Attributes:
        split: which way.
        axis: the ranks that have the other parts.
        whole_in, whole_out: K and N of the whole layer.
    """

    def __init__(self, whole: nn.Linear, split: Split, axis: Axis):
        first, last = axis.share(whole.out_features if split == "column" else whole.in_features)
        super().__init__(
            whole.in_features if split == "column" else last - first,
            last - first if split == "column" else whole.out_features,
            # A row-wise layer's bias is added once.
            bias=whole.bias is not None and (split == "column" or axis.index == 0),
            device=whole.weight.device,
            dtype=whole.weight.dtype,
        )
        self.split: Split = split
        self.axis = axis
        self.whole_in, self.whole_out = whole.in_features, whole.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Compute the output, without gradients: those are the adapted layers' (lora)."""
        output = functional.linear(input, self.weight, self.bias)
        return self.axis.sum_(output) if self.split == "row" else output


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A `WeightPart` is what a rank holds of a parameter: [start, stop) of dimension `dim`."""

    dim: int
    start: int
    stop: int


def split_model(model: Any, axis: Axis) -> dict[str, WeightPart]:
    """Put parts in the place of a model's linear layers and its embedding.

    Args:
        model: a causal LM on the meta device.

    Returns:
        By name the parameters that this rank holds a part of.

    Raises:
        Unsupported: the family has no plan, or one that is not for this axis.
    """
    if axis.size == 1:
        return {}
    MeshShape(tp=axis.size).check_split(model.config.get_text_config().to_dict(), _name(model))
    parts: dict[str, WeightPart] = {}
    head = model.get_output_embeddings()
    kinds = _kinds(model)
    for name, module in list(model.named_modules()):
        kind = "column" if module is head else kinds.get(name)
        if not isinstance(module, nn.Linear):
            if kind is not None:
                raise _refusal(model, f"{name} is a {type(module).__name__}, not a linear layer")
            continue
        if kind is None:
            raise _refusal(model, f"its plan does not say how {name} is split")
        if type(module) is not nn.Linear:
            raise _refusal(model, f"{name} is a {type(module).__name__}")
        model.set_submodule(name, SplitLinear(module, kind, axis))
        own = axis.share(module.out_features if kind == "column" else module.in_features)
        parts[f"{name}.weight"] = WeightPart(0 if kind == "column" else 1, *own)
        if module.bias is not None and kind == "column":
            parts[f"{name}.bias"] = WeightPart(0, *own)
    parts.update(_split_embedding(model, head, axis))
    return parts


def _split_embedding(model: Any, head: nn.Linear, axis: Axis) -> dict[str, WeightPart]:
    """Keep some rows of the embedding; a tied head keeps the same."""
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding)
    tied = embedding.weight is head.weight
    count = len(embedding.weight)
    first, last = axis.share(count)
    if share(count, axis.size, axis.size - 1) == (count, count):
        raise _refusal(model, f"a vocabulary of {count} leaves a rank without a token")
    rows = torch.empty_like(embedding.weight[first:last])
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    if tied:
        model.get_output_embeddings().weight = embedding.weight
    _look_up_in_parts(embedding, first, last, axis)
    return {f"{name}.weight": WeightPart(0, first, last)}


def _look_up_in_parts(embedding: nn.Module, first: int, last: int, axis: Axis) -> None:
    """Look a token's row up on the rank that has it; the others add zeros."""
    strays: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        local = inputs[0] - first
        strays.append((local < 0) | (local >= last - first))
        return (local.clamp(0, last - first - 1),)

    def after(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return axis.sum_(output.masked_fill(strays.pop().unsqueeze(-1), 0.0))

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)


def _kinds(model: Any) -> dict[str, Split]:
    """Read how the family's plan splits each module."""
    plan = getattr(model.base_model.config, "base_model_tp_plan", None)
    if not plan:
        raise _refusal(model, "transformers has no tensor-parallel plan for its family")
    prefix = next(name for name, module in model.named_modules() if module is model.base_model)
    kinds: dict[str, Split] = {}
    for pattern, kind in plan.items():
        if kind in WHOLE or kind == BY_VOCABULARY:
            continue
        if kind not in KINDS:
            raise _refusal(model, f"its plan splits {pattern} by {kind!r}")
        matches = re.compile(re.escape(f"{prefix}.{pattern}").replace(r"\*", r"\d+")).fullmatch
        named = [name for name, _ in model.named_modules() if matches(name)]
        kinds.update(dict.fromkeys(named, KINDS[kind]))
    return kinds


def _refusal(model: Any, reason: str) -> Unsupported:
    return Unsupported(
        f"base {_name(model)} cannot be split over tp: {reason}; use tp=1, and dp for the ranks"
    )


def _name(model: Any) -> str:
    return f"{model.config._name_or_path!r} ({type(model).__name__})"
