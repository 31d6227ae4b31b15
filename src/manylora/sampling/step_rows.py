"""A step of decoding has as few more rows than sequences as their bits allow.

How many is found by trying, once for each base and number of threads (see `kernels.row_counts`).
Two ways are open to a base's products: its weights once more in the order that products of few rows
read, or as they are. What does not come from linear layers and elementwise functions, as experts
do, is not tried; steps of such a base are filled up to multiples that hold for all.

K terms of each sum, N columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from manylora.kernels import RowCounts, ladder, safe_for_functions, safe_packed, safe_plain
from manylora.lora.groups import Group, groups_of
from manylora.models import BaseModel
from manylora.models.stream import decode_multiple

log = logging.getLogger("manylora.sampling")

# Weights that are kept twice take so many bytes more at most; a larger base's are read as they are.
# A fixed number, not a share of what is free: a restart must find the same.
MOST_PACKED_BYTES = 1 << 31


@dataclass(frozen=True, slots=True)
class FoundRows:
    """`FoundRows` are the numbers of rows that a step may have.

    Attributes:
        hidden: for the blocks.
        logits: for the head and the draw.
        packed: whether products read the weights that are kept twice.
    """

    hidden: RowCounts
    logits: RowCounts
    packed: bool

    def told(self) -> str:
        """Tell the numbers of rows in words."""
        way = "weights kept twice" if self.packed else "weights as they are"
        return f"{way}; blocks of {_told(self.hidden)} rows, logits of {_told(self.logits)}"


class StepRows:
    """A `StepRows` finds the numbers of rows that steps of decoding on one base may have."""

    def __init__(self, base: BaseModel, max_sequences: int, logits_rows: int):
        """Nothing is tried before it is asked for. A step's hidden states have `max_sequences` rows
        at most, its logits `logits_rows`."""
        self._base = base
        self._limits = max_sequences, min(logits_rows, max_sequences)
        self._found: dict[int, FoundRows] = {}

    def __call__(self) -> FoundRows:
        """Find what holds with torch's number of threads; it is tried on the first call."""
        threads = torch.get_num_threads()
        if threads not in self._found:
            self._found[threads] = self._settle(threads)
        return self._found[threads]

    @property
    def promised_bytes(self) -> int:
        """Weights that are kept twice will take this many bytes, and do not take them yet."""
        settled = torch.get_num_threads() in self._found
        if settled or any(found.packed for found in self._found.values()):
            return 0
        return kept_twice_bytes(self._base)

    def _settle(self, threads: int) -> FoundRows:
        base = self._base
        multiple = decode_multiple(base.dtype, base.vocab_size)
        groups = groups_of(base.model)
        if not _alone(base) or not groups or not _only_known(base.model, _layers(groups)):
            return FoundRows(RowCounts((), multiple), RowCounts((), multiple), packed=False)
        head = groups[base.model.get_output_embeddings().group.number]
        blocks = [group for group in groups.values() if group is not head]
        tried = [
            _Trial(base, [head], ladder(self._limits[1]), threads, multiple),
            _Trial(base, blocks, ladder(self._limits[0]), threads, multiple),
        ]
        packed = kept_twice_bytes(base) > 0 and all(trial.packs() for trial in tried)
        if packed:
            for group in groups.values():
                group.pack()
        logits, hidden = (
            RowCounts(trial.counts if packed else trial.plain(), multiple) for trial in tried
        )
        found = FoundRows(hidden, logits, packed)
        log.info("steps of decoding with %d threads: %s", threads, found.told())
        return found


class _Trial:
    """A trial has the numbers of rows that were found for some input groups."""

    def __init__(
        self,
        base: BaseModel,
        groups: Iterable[Group],
        counts: tuple[int, ...],
        threads: int,
        multiple: int,
    ):
        self._dtype, self._threads, self._multiple = base.dtype, threads, multiple
        self._layers = [layer for group in groups for layer in group.layers]
        self._shapes = {(layer.in_features, layer.out_features) for layer in self._layers}
        widths = {size for shape in self._shapes for size in shape} | {_head_dim(base)}
        # Those that elementwise functions allow.
        safe = [safe_for_functions(width, base.dtype, threads, counts) for width in widths]
        self.counts = self._allowed(counts, safe)

    def packs(self) -> bool:
        """Say whether all numbers of rows keep their bits with weights that are kept twice."""
        kinds = {(one.in_features, one.out_features, one.bias is not None) for one in self._layers}
        return all(type(layer) is nn.Linear for layer in self._layers) and all(
            len(safe_packed(*kind, self._dtype, self._threads, self.counts)) == len(self.counts)
            for kind in sorted(kinds)
        )

    def plain(self) -> tuple[int, ...]:
        """Find the numbers that keep their bits with the weights as they are."""
        safe = [
            safe_plain(*shape, self._dtype, self._threads, self.counts, self._multiple)
            for shape in sorted(self._shapes)
        ]
        return self._allowed(self.counts, safe)

    def _allowed(self, counts: tuple[int, ...], safe: Sequence[frozenset[int]]) -> tuple[int, ...]:
        return tuple(
            count
            for count in counts
            if count % self._multiple == 0 or all(count in found for found in safe)
        )


def _layers(groups: Mapping[int, Group]) -> list[nn.Linear]:
    return [layer for group in groups.values() for layer in group.layers]


def _alone(base: BaseModel) -> bool:
    # The ranks of a mesh need not have found the same.
    return base.device.type == "cpu" and base.mesh.shape.size == 1


def _only_known(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Return whether a base's embedding and these linear layers read all of its matrices."""
    known = {id(parameter) for layer in layers for parameter in layer.parameters()}
    known.update(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding))
    return all(id(p) in known or p.dim() < 2 for p in model.parameters())


def kept_twice_bytes(base: BaseModel) -> int:
    """Return the bytes that a base's weights take once more from the first sampling on, at most."""
    return twice_bytes(base.model, _layers(groups_of(base.model))) if _alone(base) else 0


def twice_bytes(model: nn.Module, layers: Sequence[nn.Module], itemsize: int | None = None) -> int:
    """Return the bytes of linear layers that decoding on a CPU keeps twice; 0 if it does not.

    By the model alone, whatever memory is free: the two ways need not have the same bits. Tokens
    pass the layers, whose numbers have `itemsize` bytes; None = as they are.
    """
    if not all(type(layer) is nn.Linear for layer in layers) or not _only_known(model, layers):
        return 0
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    total = sum(weight.numel() * (itemsize or weight.element_size()) for weight in weights)
    return total if total <= MOST_PACKED_BYTES else 0


def _head_dim(base: BaseModel) -> int:
    config = base.model.config.get_text_config()
    named = getattr(config, "head_dim", None)
    return int(named or config.hidden_size // config.num_attention_heads)


def _told(rows: RowCounts) -> str:
    multiples = f"multiples of {rows.multiple}"
    if not rows.counts:
        return multiples
    few = ", ".join(map(str, rows.counts[:4]))
    return f"{few} … {rows.counts[-1]}, then {multiples}"
