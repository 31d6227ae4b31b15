"""PEFT reads the names of a base's linear layers in this way when it loads an adapter.

PEFT 0.21 rewrites targets of families whose experts transformers 5 has fused: a target that ends in
`gate_proj`, `up_proj` or `down_proj` (Mixtral's `w1`, `w2`, `w3`) becomes one on the experts, also
where it names a dense layer in full. And it renames an adapter's tensors as transformers renames
those of the family's old checkpoints. A test holds these rules against the installed PEFT.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from manylora.types.weight_forms import Naming

# PEFT's `_MOE_TARGET_MODULE_MAPPING`: what it rewrites, by the family whose rules hold.
REWRITTEN = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# What PEFT calls an adapter that it loads, and what it does to its tensors' names before it renames
# as transformers does.
_ADAPTER = "default"
_PEFTS_OWN = {
    "base_model.model.model.": "model.",
    "base_model.model.": "",
    r"(lora_[^\.]*)": rf"\1.{_ADAPTER}",
}


def rewritten_targets(model_type: str | None) -> tuple[str, ...]:
    """Return the leaf names that PEFT takes for the experts' in this family."""
    families = {**conversion_mapping._MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    family = families.get(model_type or "")
    if family is None or conversion_mapping.get_checkpoint_conversion_mapping(model_type) is None:
        return ()
    return REWRITTEN.get(family, ())


def lost_names(model: Any, names: Iterable[str]) -> set[str]:
    """Return those of these layers whose factors PEFT would look for under another name."""
    names = sorted(names, key=dot_natural_key)
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    lost = {name for name in names if _first_renamed(mapping, name) != name}
    if conversion_mapping.get_checkpoint_conversion_mapping(_family(model)) is None:
        return lost
    renamings = [WeightRenaming(old, new) for old, new in _PEFTS_OWN.items()]
    for transform in conversion_mapping.get_model_conversion_mapping(model):
        if isinstance(transform, WeightRenaming):
            renamings.append(transform)
        elif isinstance(transform, WeightConverter):
            renamings += [WeightRenaming(taken, "experts.") for taken in _taken(transform)]
    for name in names:
        key = f"base_model.model.{name}.lora_A.weight"
        renamed, _ = rename_source_key(key, renamings, [])
        # PEFT undoes what only took a prefix away.
        if not key.endswith("".join(renamed.rsplit(f".{_ADAPTER}", 1))):
            lost.add(name)
    return lost


def _first_renamed(mapping: dict[str, str], name: str) -> str:
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _taken(converter: WeightConverter) -> list[str]:
    """Return patterns of factors that PEFT takes for those of the experts that this one fuses."""
    targets = converter.target_patterns
    if len(targets) != 1 or not targets[0].endswith(("gate_up_proj", "down_proj")):
        return []
    return [f"{pattern.rsplit('.', 1)[0]}.lora_A.*" for pattern in converter.source_patterns]


def namings(model: Any, linears: Collection[nn.Module]) -> dict[str, Naming]:
    """Return how PEFT can be told of each of the model's linear layers, by its name."""
    own = set(linears)
    names = [name for name, module in model.named_modules() if module in own]
    rewritten = rewritten_targets(_family(model))
    lost = lost_names(model, names)
    others = [name for name, module in model.named_modules() if module not in own]
    leaves = {name.rpartition(".")[2] for name in others}
    endings = {name[at + 1 :] for name in others for at, c in enumerate(name) if c == "."}
    found: dict[str, Naming] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        alone: Naming = "pattern" if name in endings else "full" if leaf in leaves else "leaf"
        if alone == "pattern" and rewritten:
            alone = "lost"  # there PEFT makes leaf names of a regular expression
        found[name] = "parameter" if leaf in rewritten else alone
        if name in lost:
            found[name] = "lost"
    return found


def _family(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)
