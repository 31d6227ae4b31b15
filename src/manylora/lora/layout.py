"""A layout says where each module's factors lie in an adapter's one vector.

K input features, N output features, R LoRA rank, P parameters of the adapter.

    weights_P = … | A of q | A of k | A of v | Bᵀ of q | Bᵀ of k | Bᵀ of v | A of o | Bᵀ of o | …

The A factors of an input group lie together, so that one matrix product shrinks the shared input
for all of them. Both factors are stored rank-major: A as [R, K], B transposed as [R, N].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeVar

from manylora.lora.sites import Target
from manylora.types import AdapterSpec


class Vector(Protocol):
    """A vector is a numpy array or a torch tensor of one dimension."""

    def __getitem__(self, index: slice, /) -> Any: ...


V = TypeVar("V", bound=Vector)


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor is one site's share of the vector: A [R, K] at `a_start`, Bᵀ [R, N] at `b_start`."""

    site: str
    group: int
    rank: int
    alpha: float
    scale: float
    in_features: int
    out_features: int
    a_start: int
    b_start: int

    def a(self, vector_P: V) -> V:
        """Return A [R, K], a view of a numpy or torch vector."""
        return rows(vector_P, self.a_start, self.rank, self.in_features)

    def b_transposed(self, vector_P: V) -> V:
        """Return Bᵀ [R, N], a view of a numpy or torch vector."""
        return rows(vector_P, self.b_start, self.rank, self.out_features)


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout has all factors of one adapter, in the order of the base's sites, and P."""

    factors: tuple[Factor, ...]
    num_params: int

    def groups(self) -> Iterator[tuple[int, tuple[Factor, ...]]]:
        """Return (input group, its factors); their A blocks are adjacent."""
        for group, factors in groupby(self.factors, key=lambda factor: factor.group):
            yield group, tuple(factors)


def rows(vector_P: V, start: int, height: int, width: int) -> V:
    """Return the [height, width] matrix that begins at `start`, a view."""
    return vector_P[start : start + height * width].reshape(height, width)


def plan_layout(spec: AdapterSpec, targets: Sequence[Target]) -> Layout:
    """Lay the factors of `targets` end to end."""
    factors: list[Factor] = []
    offset = 0
    for _, grouped in groupby(targets, key=lambda target: target.site.group):
        members = tuple(grouped)
        a_starts = []
        for target in members:
            a_starts.append(offset)
            offset += target.rank * target.site.in_features
        for target, a_start in zip(members, a_starts, strict=True):
            factors.append(
                Factor(
                    site=target.site.name,
                    group=target.site.group,
                    rank=target.rank,
                    alpha=target.alpha,
                    scale=spec.scale(target.rank, target.alpha),
                    in_features=target.site.in_features,
                    out_features=target.site.out_features,
                    a_start=a_start,
                    b_start=offset,
                )
            )
            offset += target.rank * target.site.out_features
    return Layout(tuple(factors), offset)
