"""Adapters can act on the linear layers of a base, and each names some of them.

K input features, N output features.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from manylora.types import ALL_LINEAR, AdapterSpec, TargetError
from manylora.types.mesh_shape import Split
from manylora.types.patterns import BadPattern, Matching, shown
from manylora.types.weight_forms import Naming

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Site:
    """A site is one linear layer of the base that can carry adapters.

    Attributes:
        name: its module path, as in the base's own state dict (`model.layers.0.mlp.up_proj`).
        in_features: K.
        out_features: N.
        group: number of its input group: the sites that read the very same tensor (q, k and v of
            a layer, say), which share one pass over it.
        is_head: whether it is the output head.
        naming: how PEFT can be told of it (see `types.base.Naming`).
        split: over tensor-parallel ranks: `column` splits N, `row` splits K, `whole` neither. K and
            N are those of the whole layer.
    """

    name: str
    in_features: int
    out_features: int
    group: int
    is_head: bool = False
    split: Split = "whole"
    naming: Naming = "leaf"

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Target:
    """A target is a site that an adapter acts on, with the rank and alpha that hold there."""

    site: Site
    rank: int
    alpha: float


def resolve_targets(spec: AdapterSpec, sites: Sequence[Site]) -> tuple[Target, ...]:
    """Return the sites that `spec` names, in the order of `sites`.

    A leaf name matches a module path's end, a regular expression the whole path, and a pattern of
    `rank_pattern` / `alpha_pattern` the path's end, all as in PEFT. Matching is bounded (see
    `types.patterns`). Raises TargetError: a name or pattern matches nothing; the message lists what
    could match.
    """
    matching = Matching()
    chosen = [site for site in sites if _is_target(spec.targets, site, matching)]
    for name in _idle_targets(spec.targets, chosen):
        raise TargetError(
            f"target {name!r} matches no linear layer of this base; {_candidates(sites)}"
        )
    for field, patterns in (
        ("rank_pattern", spec.rank_pattern),
        ("alpha_pattern", spec.alpha_pattern),
    ):
        for pattern in patterns:
            if not any(_ends_in(pattern, site.name, field, matching) for site in chosen):
                raise TargetError(
                    f"{field} {pattern!r} matches none of the targeted layers; "
                    f"{_candidates(chosen)}"
                )
    return tuple(
        Target(
            site,
            _override(spec.rank_pattern, site.name, spec.rank, "rank_pattern", matching),
            _override(spec.alpha_pattern, site.name, spec.alpha, "alpha_pattern", matching),
        )
        for site in chosen
    )


def _is_target(targets: str | tuple[str, ...], site: Site, matching: Matching) -> bool:
    if targets == ALL_LINEAR:
        return not site.is_head
    if isinstance(targets, str):
        return _matched("targets", targets, matching, targets, site.name)
    return any(site.name == t or site.name.endswith(f".{t}") for t in targets)


def _idle_targets(targets: str | tuple[str, ...], chosen: Sequence[Site]) -> list[str]:
    """Return the targets that name no site."""
    if isinstance(targets, str):
        return [] if chosen else [targets]
    endings = {ending for site in chosen for ending in endings_of(site.name)}
    return [target for target in targets if target not in endings]


def endings_of(name: str) -> list[str]:
    """Return a module path and its endings: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _override(
    patterns: Mapping[str, Value], name: str, default: Value, field: str, matching: Matching
) -> Value:
    for pattern, value in patterns.items():
        if _ends_in(pattern, name, field, matching):
            return value
    return default


def _ends_in(pattern: str, name: str, field: str, matching: Matching) -> bool:
    return _matched(field, pattern, matching, rf"(.*\.)?({pattern})", name)


def _matched(field: str, written: str, matching: Matching, pattern: str, name: str) -> bool:
    try:
        return matching.full(pattern, name)
    except BadPattern as error:
        raise TargetError(
            f"{field}: {shown(written)} is not a regular expression that can be used: {error}"
        ) from error


def _candidates(sites: Sequence[Site]) -> str:
    leaves = Counter(site.leaf for site in sites)
    listed = ", ".join(f"{leaf} ({count})" for leaf, count in leaves.items())
    example = f"; full names look like {sites[0].name}" if sites else ""
    return f"there are: {listed}{example}"
