"""PEFT names an adapter's modules in `adapter_config.json`; unsupported settings are refused.

PEFT matches a list entry t against a module path by `path == t or path.endswith("." + t)`, a string
by `re.fullmatch`, and a pattern of `rank_pattern` / `alpha_pattern` by `(.*\\.)?(pattern)$`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from manylora.checkpoint.manifest import JSON
from manylora.lora.sites import Site, endings_of
from manylora.types import ALL_LINEAR, CheckpointDamaged, Unsupported
from manylora.types.patterns import BadPattern, Matching, compiled, shown

Number = TypeVar("Number", int, float)

# What PEFT makes of a pattern of ranks or alphas and of `layers_pattern`, and takes without one.
_PATTERN = r"(.*\.)?({})$"
_LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<index>\d+)\."
_ANY_LIST = r".*?\.[^.]*\.(?P<index>\d+)\."

# Fields that are understood here, or that say nothing about what the adapter computes.
_KNOWN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config"),
    *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "target_parameters", "task_type", "use_rslora"),
}

# Why a field that is set is refused. One that is not listed here is refused too.
_REFUSED = {
    "use_dora": "DoRA rescales the base's weights",
    "modules_to_save": "it holds whole modules, not low-rank factors",
    "trainable_token_indices": "it holds rows of the embedding",
    "lora_bias": "B has a bias",
    "fan_in_fan_out": "the base's weights are stored transposed",
    "layer_replication": "it repeats layers of the base",
    "use_qalora": "QA-LoRA pools the input of A",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "monteclora_config": "it samples its factors",
    "kasa_config": "it has a diagonal between A and B and truncates the base",
    "velora_config": "it changes the gradient of A",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "loftq_config": "LoftQ replaces the base's weights",
    "corda_config": "CorDA replaces the base's weights",
    "lora_ga_config": "LoRA-GA replaces the base's weights",
    "megatron_config": "its layers are Megatron's",
    "ensure_weight_tying": "it ties factors of two modules",
}

# Initialisations that leave the base as it is; every other one (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) takes its start out of the base's weights, and loading repeats that.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A `PeftConfig` holds the fields of `adapter_config.json` that decide what is computed.

    Its patterns are matched within bounds (see `types.patterns`); one that is beyond them raises
    `CheckpointDamaged`, which names `where` and the field.
    """

    where: str
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    dropout: float
    base_name: str | None
    targets: str | frozenset[str] | None
    excluded: str | frozenset[str]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    parameters: frozenset[str] = frozenset()
    _matching: Matching = field(default_factory=Matching, compare=False, repr=False)

    def rank_of(self, name: str) -> int:
        """Return the rank of the module of that path."""
        return self._pattern_value("rank_pattern", self.rank_pattern, self._key(name), self.rank)

    def alpha_of(self, name: str) -> float:
        """Return the alpha of the module of that path."""
        return self._pattern_value("alpha_pattern", self.alpha_pattern, self._key(name), self.alpha)

    def _key(self, name: str) -> str:
        """Return what patterns are matched with: a module's path, or that of its weight."""
        weight = f"{name}.weight"
        return weight if _is_named(self.parameters, weight) else name

    def adapts(self, site: Site) -> bool:
        """Return whether PEFT would put factors on `site`."""
        if self._key(site.name) != site.name:
            return True
        if self._matches("exclude_modules", self.excluded, site.name):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == ALL_LINEAR:
                return not site.is_head
            return self._matches("target_modules", self.targets, site.name)
        names = self.targets or frozenset()
        # A module that is named in full is adapted whatever the layer.
        return site.name in names or (
            _is_named(names, site.name) and self._layer_is_adapted(site.name)
        )

    def _layer_is_adapted(self, name: str) -> bool:
        if not self.layers:
            return True
        for pattern in self.layers_pattern or [_ANY_LIST]:
            written = pattern if pattern is _ANY_LIST else _LAYERS_PATTERN.format(pattern)
            with self._named("layers_pattern", pattern):
                match = self._matching.start(written, name)
            if match:
                return int(match["index"]) in self.layers
        return False

    def _pattern_value(
        self, key: str, patterns: Mapping[str, Number], name: str, default: Number
    ) -> Number:
        for pattern, value in patterns.items():
            with self._named(key, pattern):
                if self._matching.start(_PATTERN.format(pattern), name):
                    return value
        return patterns.get(name, default)

    def _matches(self, key: str, targets: str | Set[str], name: str) -> bool:
        if not isinstance(targets, str):
            return _is_named(targets, name)
        with self._named(key, targets):
            return self._matching.full(targets, name)

    @contextmanager
    def _named(self, key: str, pattern: str) -> Iterator[None]:
        try:
            yield
        except BadPattern as error:
            raise CheckpointDamaged(f"{self.where}: {key} is {shown(pattern)}; {error}") from error


def parse_config(fields: Mapping[str, JSON], where: str) -> PeftConfig:
    """Parse an `adapter_config.json`, or say by name what of it is not supported.

    Args:
        where: the file's path, for messages.

    Raises:
        Unsupported: it asks for something other than plain LoRA; every such field is named.
        CheckpointDamaged: a field has a wrong type or value.
    """
    refused = _refusals(fields)
    if refused:
        raise Unsupported(f"{where} asks for what manylora does not do: {'; '.join(refused)}")
    taker = _Taker(fields, where)
    targets, excluded = taker.names("target_modules"), taker.names("exclude_modules") or ()
    listed = taker.names("layers_pattern") or ()
    layers_pattern = (listed,) if isinstance(listed, str) else listed
    for pattern in layers_pattern:
        taker.require_regex("layers_pattern", pattern, _LAYERS_PATTERN)
    return PeftConfig(
        where=where,
        rank=taker.rank("r", fields.get("r")),
        alpha=taker.number("lora_alpha", fields.get("lora_alpha")),
        rank_pattern=taker.pattern("rank_pattern", taker.rank),
        alpha_pattern=taker.pattern("alpha_pattern", taker.number),
        use_rslora=fields.get("use_rslora") is True,
        dropout=taker.number("lora_dropout", fields.get("lora_dropout") or 0.0),
        base_name=str(fields.get("base_model_name_or_path") or "") or None,
        targets=frozenset(targets) if isinstance(targets, tuple) else targets,
        excluded=frozenset(excluded) if isinstance(excluded, tuple) else excluded,
        layers=taker.indices("layers_to_transform"),
        parameters=taker.parameters(),
        layers_pattern=layers_pattern,
    )


def refuse_lost(names: Iterable[str], sites: Sequence[Site], what: str) -> None:
    """Refuse an adapter (`what`, in the message) on layers of these names that PEFT would not find
    again.

    Raises Unsupported: there are such layers; the message names them and the way out.
    """
    names = set(names)
    lost = [site.name for site in sites if site.naming == "lost" and site.name in names]
    if lost:
        raise Unsupported(
            f"{what} cannot be written as PEFT's files: with this base PEFT would look for the "
            f"factors of {', '.join(lost[:8])}{' …' * (len(lost) > 8)} under other names; leave "
            "these layers out of its targets, or export it merged into its base (--merged; in "
            "Python merged=True)"
        )


def exact_targets(chosen: set[str], sites: Sequence[Site]) -> str | tuple[str, ...]:
    """Return the shortest sorted list of names that matches `chosen` and no other of `sites`.

    It has a leaf name where every site of that ending is chosen, else full names. Where the full
    name of a chosen site is the ending of another module's, no list can tell them apart, and a
    regular expression is returned.
    """
    names: set[str] = set()
    shared = {site.leaf for site in sites if site.naming != "leaf"}
    for leaf in {site.leaf for site in sites if site.name in chosen}:
        alike = [site.name for site in sites if site.leaf == leaf]
        names.update(
            [leaf]
            if all(name in chosen for name in alike) and leaf not in shared
            else chosen.intersection(alike)
        )
    apart = not any(site.naming == "pattern" and site.name in chosen for site in sites)
    if apart and all((site.name in chosen) == _is_named(names, site.name) for site in sites):
        return tuple(sorted(names))
    return "|".join(re.escape(name) for name in sorted(chosen))


def exact_pattern(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """Return the commonest of the values by module path, and a pattern for those that differ."""
    default = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, dict[str, Number]] = defaultdict(dict)
    for name, value in values.items():
        by_leaf[name.rpartition(".")[2]][name] = value
    pattern: dict[str, Number] = {}
    for leaf, members in by_leaf.items():
        if len(set(members.values())) == 1:
            members = {leaf: next(iter(members.values()))}
            keys = {leaf: re.escape(leaf)}
        else:
            keys = {name: "^" + re.escape(name) for name in members}
        pattern.update({keys[name]: value for name, value in members.items() if value != default})
    return default, pattern


def _bare_parameters(named: JSON) -> bool:
    """Return whether any of them is not a weight; weights may be linear layers'."""
    listed = named if isinstance(named, list) else [named] if named else []
    return any(not str(name).endswith(".weight") for name in listed)


def _refusals(fields: Mapping[str, JSON]) -> list[str]:
    found = []
    if fields.get("peft_type") != "LORA":
        found.append(f"peft_type {fields.get('peft_type')!r} (only LORA)")
    if fields.get("bias") not in (None, "none"):
        found.append(f"bias {fields['bias']!r} (only 'none')")
    if fields.get("init_lora_weights") not in _HARMLESS_INITS:
        found.append(
            f"init_lora_weights {fields['init_lora_weights']!r} (the base's weights were changed; "
            "convert the adapter to plain LoRA when saving it)"
        )
    if _bare_parameters(fields.get("target_parameters")):
        found.append("target_parameters (it adapts bare parameters, not linear layers)")
    found += [
        f"{name} ({_REFUSED.get(name, 'a field that this version does not know')})"
        for name, value in fields.items()
        if name not in _KNOWN and value not in (None, False, "", [], {})
    ]
    return found


def _is_named(targets: Set[str], name: str) -> bool:
    # Looking up the name's endings costs the same for ten targets and for ten thousand.
    return any(ending in targets for ending in endings_of(name))


class _Taker:
    """A `_Taker` takes typed values out of the file's fields; a wrong one is the file's damage."""

    def __init__(self, fields: Mapping[str, JSON], where: str) -> None:
        self._fields = fields
        self._where = where

    def number(self, name: str, value: JSON) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return value

    def rank(self, name: str, value: JSON) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, value, "a whole number ≥ 1")
        return value

    def pattern(self, name: str, take: Callable[[str, JSON], Number]) -> dict[str, Number]:
        value = self._fields.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        for pattern in value:
            self.require_regex(name, pattern, _PATTERN)
        return {pattern: take(f"{name}[{pattern!r}]", item) for pattern, item in value.items()}

    def names(self, name: str) -> str | tuple[str, ...] | None:
        """Return a list of names, or a string that is a regular expression."""
        value = self._fields.get(name)
        if value is None or isinstance(value, str):
            self.require_regex(name, value or "", "{}")
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a string or a list of strings")
        return tuple(str(item) for item in value)

    def parameters(self) -> frozenset[str]:
        """Return linear layers' weights that are adapted as parameters, which is plain LoRA too."""
        named = self.names("target_parameters") or ()
        return frozenset((named,) if isinstance(named, str) else named)

    def indices(self, name: str) -> tuple[int, ...] | None:
        value = self._fields.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self._index(name, item) for item in listed) or None

    def _index(self, name: str, value: JSON) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a layer's number or a list of them")
        return value

    def require_regex(self, name: str, text: str, within: str) -> None:
        """Refuse a text that is no regular expression; `within` is what PEFT puts around it."""
        try:
            compiled(text)
            compiled(within.format(text))
        except BadPattern as error:
            raise self._wrong(name, text, f"a regular expression ({error})") from error

    def _wrong(self, name: str, value: JSON, right: str) -> CheckpointDamaged:
        text = shown(value) if isinstance(value, str) else repr(value)[:200]
        return CheckpointDamaged(f"{self._where}: {name} is {text}; it must be {right}")
