"""The cache keeps keys and values of the sequences that are being continued.

S sequences, n neighbouring ones, H key-value heads, D head dimension, L tokens of an extent.

The cache of a layer is one flat tensor. A sequence owns an extent of it, which is laid out
[H, L, D], so that attention reads it in place. What is read of it ends at a block's end: a length
that follows from the sequence alone, so that its numbers do not depend on its neighbours, and one
that is often the neighbour's too, so that both can share a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from manylora.models.sight import Sight
from manylora.types.data import Array

# Extents and what attention reads of them are whole blocks of this many tokens.
BLOCK = 64
# A cache begins with room for this many tokens and grows by doubling.
FIRST_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Extent:
    """An extent is the tokens [start, start + tokens) of the cache; both are whole blocks."""

    start: int
    tokens: int


@dataclass(slots=True)
class CachedLayer:
    """A `CachedLayer` is one layer's keys or values, flat, with the heads and a head's size."""

    flat: Tensor
    heads: int
    head_dim: int

    def rows(self) -> Tensor:
        """Return the layer as rows [tokens of the cache · H, D]."""
        return self.flat.view(-1, self.head_dim)

    def runs_of(self, extent: Extent, count: int, reach: int) -> Tensor:
        """Return the first `reach` tokens of `count` adjacent extents this long, [n, H, L, D]."""
        row = self.head_dim
        return self.flat.as_strided(
            (count, self.heads, reach, row),
            (extent.tokens * self.heads * row, extent.tokens * row, row, 1),
            self.flat.storage_offset() + extent.start * self.heads * row,
        )


# One layer's, in that order.
KeysValues = tuple[CachedLayer, CachedLayer]


class KVCache:
    """A `KVCache` deals out room for keys and values, of a bounded number of tokens, in extents."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max(1, max_tokens // BLOCK) * BLOCK
        self.used_tokens = 0
        self._capacity = 0
        self._free = [Extent(0, self.max_tokens)]
        self._layers: dict[int, KeysValues] = {}

    def allocate(self, tokens: int) -> Extent | None:
        """Return the first free extent that is long enough, zeroed; None if there is none.

        Zeroed, because what attention leaves out it multiplies by zero, and the last owner may
        have left NaN.
        """
        wanted = blocks(tokens)
        for number, free in enumerate(self._free):
            if free.tokens >= wanted:
                rest = Extent(free.start + wanted, free.tokens - wanted)
                self._free[number : number + 1] = [rest] if rest.tokens else []
                extent = Extent(free.start, wanted)
                self.used_tokens += wanted
                self._grow(extent.start + wanted)
                for layer in self._every_layer():
                    layer.runs_of(extent, 1, wanted).zero_()
                return extent
        return None

    def release(self, extent: Extent) -> None:
        """Take an extent back. An empty cache gives up what it had grown to."""
        self.used_tokens -= extent.tokens
        merged: list[Extent] = []
        for free in sorted([*self._free, extent], key=lambda e: e.start):
            if merged and merged[-1].start + merged[-1].tokens == free.start:
                merged[-1] = Extent(merged[-1].start, merged[-1].tokens + free.tokens)
            else:
                merged.append(free)
        self._free = merged
        if not self.used_tokens and self._capacity > FIRST_TOKENS:
            self._layers.clear()
            self._capacity = 0

    def copy(self, source: Extent, target: Extent, tokens: int) -> None:
        """Copy the first tokens of one extent to another."""
        for layer in self._every_layer():
            layer.runs_of(target, 1, tokens).copy_(layer.runs_of(source, 1, tokens))

    def layer(self, number: int, key: Tensor, value: Tensor) -> KeysValues:
        """Return keys and values of one call of attention, made on first use.

        Args:
            number: of the call among those of a forward, which are the same in every forward; a
                layer may make several.
            key, value: [1, H, T, D].
        """
        if number not in self._layers:
            self._layers[number] = (self._new_layer(key), self._new_layer(value))
        return self._layers[number]

    def _new_layer(self, like: Tensor) -> CachedLayer:
        heads, head_dim = like.shape[1], like.shape[3]
        return CachedLayer(like.new_zeros(self._capacity * heads * head_dim), heads, head_dim)

    def _every_layer(self) -> list[CachedLayer]:
        return [layer for pair in self._layers.values() for layer in pair]

    def _grow(self, tokens: int) -> None:
        if tokens <= self._capacity:
            return
        wanted = max(tokens, 2 * self._capacity, FIRST_TOKENS)
        self._capacity = min(wanted, self.max_tokens)
        for layer in self._every_layer():
            flat = layer.flat.new_zeros(self._capacity * layer.heads * layer.head_dim)
            flat[: len(layer.flat)] = layer.flat
            layer.flat = flat


@dataclass(slots=True)
class Filling:
    """A filling says where a stream's keys and values go.

    Attributes:
        extents: of each sequence.
        kept: tokens of each sequence that lie there already; the stream's follow them.
    """

    cache: KVCache
    extents: Sequence[Extent]
    kept: Sequence[int]


class DecodeRows:
    """`DecodeRows` are a step's sequences in the order of their extents, while all of them stay."""

    def __init__(self, cache: KVCache, extents: Sequence[Extent], device: torch.device):
        self.cache = cache
        self.device = device
        starts_S = np.array([extent.start for extent in extents])
        self.order_S = np.argsort(starts_S)
        self.extents = [extents[i] for i in self.order_S]
        self.start_S = starts_S[self.order_S]
        self.tokens_S = np.array([extent.tokens for extent in self.extents])
        self.order = torch.from_numpy(self.order_S).to(device)
        self.back = torch.from_numpy(np.argsort(self.order_S)).to(device)
        self.sorted = bool((np.diff(starts_S) > 0).all())
        # Whether a sequence's extent follows its predecessor's and is as long.
        self.follows_S = np.zeros(len(extents), bool)
        ends_S = self.start_S + self.tokens_S
        self.follows_S[1:] = (self.start_S[1:] == ends_S[:-1]) & (
            self.tokens_S[1:] == self.tokens_S[:-1]
        )


@dataclass(slots=True)
class DecodeStep:
    """A decode step is one new token of each sequence: where it goes, and what it may see.

    Attributes:
        rows: the sequences.
        positions_S: of the new tokens, in the order of the stream.
    """

    rows: DecodeRows
    positions_S: Array
    _sorted_S: Array = field(init=False)
    _reach_S: Array = field(init=False)
    _runs: list[tuple[int, int]] | None = None
    _places: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[Sight, torch.dtype], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sorted_S = self.positions_S[self.rows.order_S]
        self._reach_S = (self._sorted_S // BLOCK + 1) * BLOCK

    def runs(self) -> list[tuple[int, int]]:
        """Return adjacent extents of one length, read equally far, as (first, last + 1)."""
        if self._runs is None:
            joined_S = self.rows.follows_S.copy()
            joined_S[1:] &= self._reach_S[1:] == self._reach_S[:-1]
            firsts = np.flatnonzero(~joined_S).tolist()
            self._runs = list(zip(firsts, [*firsts[1:], len(joined_S)], strict=True))
        return self._runs

    def reach(self, number: int) -> int:
        """Return how many tokens are read of a sequence (by its place in the order of extents)."""
        return int(self._reach_S[number])

    def longest(self) -> int:
        return int(self._reach_S.max())

    def places(self, heads: int) -> Tensor:
        """Return int64 [S · H]: the new tokens' rows in a layer with so many heads."""
        if heads not in self._places:
            rows = self.rows
            first_SH = rows.start_S[:, None] * heads + rows.tokens_S[:, None] * np.arange(heads)
            place = torch.from_numpy((first_SH + self._sorted_S[:, None]).reshape(-1))
            self._places[heads] = place.to(rows.device)
        return self._places[heads]

    def mask(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        """Return [S, 1, 1, longest]: 0 where a token may look, -inf elsewhere."""
        key = (sight, dtype)
        if key not in self._masks:
            position_S = torch.from_numpy(self._sorted_S).to(self.rows.device)
            keys = torch.arange(self.longest(), device=self.rows.device)
            seen = sight.seen(position_S[:, None], keys)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._masks[key] = mask.masked_fill_(~seen, -torch.inf)[:, None, None]
        return self._masks[key]


def blocks(tokens: int) -> int:
    """Round `tokens` up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK
