"""How PEFT reads the names of a base's linear layers when it loads an adapter.

PEFT 0.21 rewrites targets of families whose experts transformers 5 has fused: a target that ends in
`gate_proj`, `up_proj` or `down_proj` (Mixtral's `w1`, `w2`, `w3`) becomes one on the experts, also
where it names a dense layer in full. A test holds these rules against the installed PEFT.
"""

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import conversion_mapping

from manylora.types.base import Naming

# PEFT's `_MOE_TARGET_MODULE_MAPPING`: what it rewrites, by the family whose rules hold.
REWRITTEN = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def rewritten_targets(model_type: str | None) -> tuple[str, ...]:
    """The leaf names that PEFT takes for the experts' in this family."""
    families = {**conversion_mapping._MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    family = families.get(model_type or "")
    if family is None or conversion_mapping.get_checkpoint_conversion_mapping(model_type) is None:
        return ()
    return REWRITTEN.get(family, ())


def namings(model: Any, linears: Collection[nn.Module]) -> dict[str, Naming]:
    """How PEFT can be told of each of the model's linear layers, by its name."""
    rewritten = rewritten_targets(getattr(model.config, "model_type", None))
    own = set(linears)
    others = {name.rpartition(".")[2] for name, m in model.named_modules() if m not in own}
    found: dict[str, Naming] = {}
    for name, module in model.named_modules():
        if module in own:
            leaf = name.rpartition(".")[2]
            alone: Naming = "full" if leaf in others else "leaf"
            found[name] = "parameter" if leaf in rewritten else alone
    return found
