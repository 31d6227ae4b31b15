"""Each rank of a mesh holds a part of an adapter's vectors.

Along `tp` an adapter is cut as the base is: where a layer's outputs are split, A is whole and B is
split; where its inputs are, A is split and B is whole. A rank's own vector holds the whole factors
in front and the split ones behind them, so that what has to be summed over `tp` lies together; an
input group's A factors stay adjacent.

    global  … | A of q | A of k | A of v | Bᵀ of q | Bᵀ of k | Bᵀ of v | A of o | Bᵀ of o | …
    local   A of q | A of k | A of v | Bᵀ of o | … | Bᵀ of q, k, v, own columns | A of o, own …

Along `dp` weights and gradients are whole on every rank, but the master weights and the moments are
slices of the local vector.

P parameters of the adapter, L of them on this rank, S rows of a pending gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from manylora.lora.layout import Factor, Layout, rows
from manylora.lora.sites import Site
from manylora.parallel import Mesh
from manylora.parallel import share as share_of
from manylora.types.data import Array
from manylora.types.mesh_shape import Split


class Coordinate(NamedTuple):
    """A coordinate is the ranks of one axis of a mesh, and a rank's index among them."""

    size: int = 1
    index: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's place in a mesh is its coordinate on each axis, by the axis's name.

    An axis that is not named has one rank.
    """

    axes: Mapping[str, Coordinate] = field(default_factory=dict)

    def __getitem__(self, axis: str) -> Coordinate:
        return self.axes.get(axis, Coordinate())

    def moved(self, axis: str, index: int) -> "Place":
        """Return the place of the rank that has another index on one axis."""
        return Place({**self.axes, axis: self[axis]._replace(index=index)})


ALONE = Place()


def place_on(mesh: Mesh) -> Place:
    """Return this rank's place on a mesh."""
    return Place({name: Coordinate(axis.size, axis.index) for name, axis in mesh.axes.items()})


@dataclass(frozen=True, slots=True)
class Part:
    """A `Part` is the part of one adapter that one rank holds.

    Attributes:
        whole: the adapter's layout, the same on every mesh.
        local: where the factors lie in this rank's vector of L numbers.
        place: whose part it is.
        splits: how the layer of each factor is split.
        longest: the largest L of all tp ranks.
        num_whole: numbers at the front of the local vector that every tp rank has.
        repeated: ranges of these, as (start, stop), whose gradient is complete on every tp rank
            rather than a term of a sum, because their layer is not split at all.
    """

    whole: Layout
    local: Layout
    place: Place
    splits: tuple[Split, ...]
    longest: int
    num_whole: int
    repeated: tuple[tuple[int, int], ...] = ()

    @property
    def slice_size(self) -> int:
        """One dp slice has this many numbers; the last slices may be shorter."""
        return -(-self.longest // self.place["dp"].size)

    @property
    def own(self) -> slice:
        """This is the rank's dp slice of the local vector."""
        size, length = self.slice_size, self.local.num_params
        start = min(self.place["dp"].index * size, length)
        return slice(start, min(start + size, length))

    def take(self, vector_P: Array) -> Array:
        """Return this rank's numbers [L] of a global vector: itself, or a copy."""
        if self.place["tp"].size == 1:
            return vector_P
        local_L = np.empty(self.local.num_params, vector_P.dtype)
        for own, its in _views(self, local_L, vector_P):
            own[...] = its
        return local_L

    def join(self, parts: Sequence[Array]) -> Array:
        """Join what every tp rank holds ([L] or longer) into the global vector [P], the inverse of
        `take`. What all of them have is read from the first."""
        tp = self.place["tp"].size
        if tp == 1:
            return parts[0]
        vector_P = np.empty(self.whole.num_params, parts[0].dtype)
        # Backwards, so that the first rank's whole factors are the last to be written.
        for index in reversed(range(tp)):
            for own, its in _views(self._of(index), parts[index], vector_P):
                its[...] = own
        return vector_P

    def shares(self, num_rows: int) -> int:
        """Count the shares that the rows of a pending gradient become here."""
        return min(-(-num_rows // self.place["tp"].size), self.place["dp"].size)

    def pending(self, lanes: Mapping[tuple[int, int], Array]) -> Array:
        """Make a pending gradient [S, P] of all ranks' sums: its rows add up to the gradient.

        Row share · tp + i holds the terms that tp rank i has of the whole factors. The split
        ones, of which there is only one term, are in the rows of i = 0.

        Args:
            lanes: (share, tp index) → what is summed there, [L] or longer.
        """
        tp = self.place["tp"].size
        shares = 1 + max(share for share, _ in lanes)
        if tp == 1:
            rows_L = [lanes[share, 0] for share in range(shares)]
            return rows_L[0][None] if shares == 1 else np.stack(rows_L)
        grad_SP = np.zeros((shares * tp, self.whole.num_params), np.float32)
        for share in range(shares):
            parts = [lanes[share, index] for index in range(tp)]
            grad_SP[share * tp] = self.join(parts)
            for index in range(1, tp):
                # The layout says where the whole factors are; the other ranges stay zero.
                alone_L = np.zeros_like(parts[index])
                alone_L[: self.num_whole] = parts[index][: self.num_whole]
                for start, stop in self.repeated:
                    alone_L[start:stop] = 0.0
                row_P = grad_SP[share * tp + index]
                for own, its in _views(self._of(index), alone_L, row_P):
                    its[...] = own
        return grad_SP

    def take_pending(self, grad_SP: Array, home: int) -> Array | None:
        """Return this rank's sum [L] of a pending gradient; None if it has none.

        On the mesh that it comes from, every term comes back to where it was. On another, the rows
        are dealt out in turn, the whole factors' terms over tp too.
        """
        dp, tp, whole = self.place["dp"], self.place["tp"], self.num_whole
        own = (dp.index - home) % dp.size
        mine = [row for row in range(len(grad_SP)) if row // tp.size % dp.size == own]
        if not mine:
            return None
        sum_L: Array | None = None
        for row in mine:
            row_L = self.take(grad_SP[row])
            once = [row_L[start:stop].copy() for start, stop in self.repeated]
            if row % tp.size != tp.index:
                row_L[:whole] = 0.0
            for (start, stop), numbers in zip(self.repeated, once, strict=True):
                row_L[start:stop] = numbers
            # Where there is nothing to add, the bits of what is there stay, zeros' signs included.
            sum_L = row_L if sum_L is None else np.where(row_L == 0.0, sum_L, sum_L + row_L)
        return sum_L

    def _of(self, tp_index: int) -> "Part":
        return _part(self.whole, self.splits, self.place.moved("tp", tp_index))


def part_of(layout: Layout, sites: Iterable[Site], place: Place) -> Part:
    """Work out what the rank at `place` holds of an adapter."""
    if place["tp"].size == 1:
        return Part(layout, layout, place, (), layout.num_params, layout.num_params)
    splits = {site.name: site.split for site in sites}
    return _part(layout, tuple(splits[factor.site] for factor in layout.factors), place)


def _part(layout: Layout, splits: tuple[Split, ...], place: Place) -> Part:
    local, num_whole = _laid_out(layout, splits, place)
    # The first rank's shares are the largest.
    longest = _laid_out(layout, splits, place.moved("tp", 0))[0].num_params
    repeated = tuple(
        span
        for factor, split in zip(local.factors, splits, strict=True)
        if split == "whole"
        for span in _spans(factor)
    )
    return Part(layout, local, place, splits, longest, num_whole, repeated)


def _laid_out(layout: Layout, splits: Sequence[Split], place: Place) -> tuple[Layout, int]:
    """Return a tp rank's layout, and how many numbers of it every rank has."""
    factors = [
        _cut(factor, split, place["tp"])
        for factor, split in zip(layout.factors, splits, strict=True)
    ]
    grouped: dict[int, list[int]] = {}
    for number, factor in enumerate(factors):
        grouped.setdefault(factor.group, []).append(number)
    a_starts, b_starts = [0] * len(factors), [0] * len(factors)
    offset = num_whole = 0
    for front in (True, False):
        for members in grouped.values():
            for number in members:
                if (splits[number] != "row") == front:
                    a_starts[number] = offset
                    offset += factors[number].rank * factors[number].in_features
            for number in members:
                if (splits[number] != "column") == front:
                    b_starts[number] = offset
                    offset += factors[number].rank * factors[number].out_features
        if front:
            num_whole = offset
    placed = tuple(
        replace(factor, a_start=a, b_start=b)
        for factor, a, b in zip(factors, a_starts, b_starts, strict=True)
    )
    return Layout(placed, offset), num_whole


def _cut(factor: Factor, split: Split, tp: Coordinate) -> Factor:
    """Return the factor's size on one rank."""
    if split == "whole":
        return factor
    size = factor.out_features if split == "column" else factor.in_features
    start, stop = share_of(size, *tp)
    if split == "column":
        return replace(factor, out_features=stop - start)
    return replace(factor, in_features=stop - start)


def _spans(factor: Factor) -> list[tuple[int, int]]:
    return [
        (factor.a_start, factor.a_start + factor.rank * factor.in_features),
        (factor.b_start, factor.b_start + factor.rank * factor.out_features),
    ]


def _views(part: Part, local_L: Array, vector_P: Array) -> Iterable[tuple[Array, Array]]:
    """Yield pairs of views: a factor in the local vector, and its numbers in the global one."""
    tp = part.place["tp"]
    for own, its, split in zip(part.local.factors, part.whole.factors, part.splits, strict=True):
        for start, its_start, width, its_width, cut in (
            (own.a_start, its.a_start, own.in_features, its.in_features, split == "row"),
            (own.b_start, its.b_start, own.out_features, its.out_features, split == "column"),
        ):
            first = share_of(its_width, *tp)[0] if cut else 0
            its_RW = rows(vector_P, its_start, own.rank, its_width)
            yield rows(local_L, start, own.rank, width), its_RW[:, first : first + width]
