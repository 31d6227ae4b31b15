"""A mesh's rank holds and sends what these formulas of shapes give; no tensor is made here.

`benchmarks.mesh` counts all of it on real ranks and fails where the two differ.

H hidden size, V vocabulary; D ranks along dp, T along tp; L numbers of an adapter's vector on a
rank, W of them in whole factors, C in one dp slice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manylora.engine.stepping import passes
from manylora.types.mesh_shape import MeshShape

# Bytes of the optimizer's numbers and of gradients.
FP32 = 4
# As in parallel/mesh.py: sums of fewer bytes are gathered whole by more than two CPU ranks.
SMALL_BYTES = 1 << 16

# By the name under which each is counted: collectives, and bytes that the rank sends.
Sent = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Base:
    """A `Base` is the shapes of a decoder whose embedding and head are not tied.

    Attributes:
        mlp: width of the MLP, or of one expert.
        item: bytes of a number.
        experts: experts of each block; 0 = a dense MLP.
        active: experts of each token; 0 = a dense MLP.
        bits: bits of a number of a block's linear layers where these are quantised (nf4 4, int8 8),
            with a scale for every block of 64; 0 = they are not.
        head_norms: whether queries and keys are normalised (Qwen3).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    item: int = 2
    experts: int = 0
    active: int = 0
    head_norms: bool = False
    bits: int = 0

    def linears(self) -> list[tuple[int, int, str]]:
        """List (inputs, outputs, how tp splits it) of a block's layers that adapters may act on."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = [(self.hidden, queries, "column")]
        found += [(self.hidden, keys, "column")] * 2
        found += [(queries, self.hidden, "row")]
        if not self.experts:
            found += [(self.hidden, self.mlp, "column")] * 2
            found += [(self.mlp, self.hidden, "row")]
        return found

    def block(self, tp: int = 1) -> list[tuple[int, int]]:
        """List (first dimension, the rest) of each parameter of a block on a tp rank."""
        return [*self._linear_shapes(tp), *self._other_shapes()]

    def block_bytes(self, tp: int = 1) -> list[tuple[int, int]]:
        """List (first dimension, bytes of the rest) of each block parameter on a tp rank."""
        others = [(n, self.item * rest) for n, rest in self._other_shapes()]
        linears = [(n, self._row_bytes(k)) for n, k in self._linear_shapes(tp)]
        return [*linears, *others]

    def _row_bytes(self, k: int) -> int:
        return k * self.bits // 8 + k // 64 * FP32 if self.bits else k * self.item

    def _linear_shapes(self, tp: int) -> list[tuple[int, int]]:
        return [
            (n // tp, k) if split == "column" else (n, k // tp) for k, n, split in self.linears()
        ]

    def _other_shapes(self) -> list[tuple[int, int]]:
        shapes = []
        if self.experts:
            shapes += [(self.experts, 2 * self.mlp * self.hidden)]
            shapes += [(self.experts, self.mlp * self.hidden), (self.experts, self.hidden)]
        shapes += [(self.head_dim, 1)] * (2 * self.head_norms)
        return [*shapes, (self.hidden, 1), (self.hidden, 1)]

    def table(self, tp: int = 1) -> list[tuple[int, int]]:
        """List (first dimension, the rest) of the embedding on a tp rank; the head has the same."""
        return [(-(-self.vocab // tp), self.hidden)]

    def parameters(self, *, of_a_token: bool = False) -> int:
        """Return the number of parameters, or of those whose products a token takes part in."""
        block = sum(n * rest for n, rest in self.block())
        if not of_a_token:
            return self.layers * block + 2 * self.vocab * self.hidden + self.hidden
        idle = 3 * self.mlp * self.hidden * (self.experts - self.active)
        return self.layers * (block - idle) + self.vocab * self.hidden


@dataclass(frozen=True, slots=True)
class Part:
    """A `Part` is a rank's part of an adapter on every linear layer but the head.

    Attributes:
        whole: W, at the front of its vector.
        length: L.
        slice_size: C.
        item: bytes of a weight that layers read.
    """

    whole: int
    length: int
    slice_size: int
    item: int

    def own(self, dp_index: int) -> int:
        """Return how many numbers this dp rank's slice has; the last may be shorter."""
        return min(max(self.length - dp_index * self.slice_size, 0), self.slice_size)

    def front(self, dp_index: int) -> int:
        """Return how many numbers of whole factors this dp rank's slice has."""
        return min(max(self.whole - dp_index * self.slice_size, 0), self.own(dp_index))

    def held(self, dp_index: int) -> dict[str, int]:
        """Return its bytes once it has stepped here; fp32 weights are their own master copy."""
        own = self.own(dp_index)
        return {
            "weights": self.length * self.item,
            "gradient": self.length * FP32,
            "master": 0 if self.item == FP32 else own * FP32,
            "moments": 2 * own * FP32,
        }


def part(base: Base, rank: int, item: int, mesh: MeshShape) -> Part:
    """Return what each rank has of an adapter of this LoRA rank."""
    whole = sum(rank * (k if split == "column" else n) for k, n, split in base.linears())
    cut = sum(rank * (n if split == "column" else k) for k, n, split in base.linears())
    whole, cut = whole * base.layers, cut * base.layers
    if mesh.tp == 1:
        return Part(whole + cut, whole + cut, -(-(whole + cut) // mesh.dp), item)
    length = whole + cut // mesh.tp
    return Part(whole, length, -(-length // mesh.dp), item)


# -- what the base holds ------------------------------------------------------------------------


def base_held(base: Base, mesh: MeshShape) -> int:
    """Return a rank's bytes at rest: shares of blocks, embedding and head, and the last norm."""
    tables = base.item * (2 * _shares(base.table(mesh.tp), mesh.dp) + base.hidden)
    return tables + base.layers * _shares(base.block_bytes(mesh.tp), mesh.dp)


def gathered(base: Base, mesh: MeshShape) -> dict[str, int]:
    """Return the bytes gathered at a time: a block, or the embedding or head; 0 if D is 1."""
    if mesh.dp == 1:
        return {"block": 0, "table": 0}
    table = base.item * sum(n * k for n, k in base.table(mesh.tp))
    return {"block": sum(n * row for n, row in base.block_bytes(mesh.tp)), "table": table}


def activations(base: Base, tp: int, rank: int, layers: int) -> int:
    """Return bytes of each token at the peak of a backward that recomputes blocks (dense bases).

    They are the inputs of all blocks, and one block's insides where its MLP's gradients are formed.
    The normalisations compute in fp32.

    Args:
        rank: rank of the adapters, which are in the base's dtype.
    """
    inputs = layers * base.hidden * base.item
    norms = (24 if base.item == FP32 else 18) * base.hidden
    mlp = 6 * base.item * (base.mlp // tp + rank)
    attention = base.heads // tp * (5 * base.item * base.head_dim + FP32)
    return inputs + norms + mlp + attention + 2 * base.item * base.head_dim + 16


# -- what is sent -------------------------------------------------------------------------------


def sum_bytes(num_bytes: int, size: int, *, fp32: bool = True, gloo: bool = False) -> int:
    """Return the bytes that a rank sends for a sum; see `Axis.sum_`."""
    if gloo and (size > 2 or not fp32) and num_bytes <= SMALL_BYTES:
        return num_bytes * (size - 1)
    return 2 * num_bytes * (size - 1) // size


@dataclass(frozen=True, slots=True)
class Stream:
    """A `Stream` is what a rank runs in one forward_backward.

    Attributes:
        rows: rows of each micro-batch, padding included.
        chunk_rows: rows of the loss at a time.
        numbers: fp32 numbers of the results of the dp rank that has most.
    """

    rows: Sequence[int]
    chunk_rows: int
    numbers: int


def forward_backward_sent(
    base: Base, mesh: MeshShape, stream: Stream, *, checkpointing: bool = False, gloo: bool = False
) -> Sent:
    """Return what one forward_backward sends, whichever adapters there are.

    Args:
        checkpointing: each block is run again in the backward, up to its last product.
    """
    sent: Sent = {}
    if mesh.dp > 1:
        table = base.item * _shares(base.table(mesh.tp), mesh.dp) * (mesh.dp - 1)
        block = _shares(base.block_bytes(mesh.tp), mesh.dp) * (mesh.dp - 1)
        # Embedding and head once, each block for its forward and for its backward.
        gathers = 2 + 2 * base.layers
        sent["dp.blocks"] = _times(len(stream.rows), gathers, 2 * table + 2 * base.layers * block)
        sent["dp.gather"] = (1, FP32 * stream.numbers * (mesh.dp - 1))
    if mesh.tp > 1:
        # The embedding; o and down, forwards; q-k-v and gate-up, backwards; the head, backwards.
        # Without dp and without checkpointing the first block's input needs no gradient.
        sums = 1 + (4 + checkpointing) * base.layers + 1 - (mesh.dp == 1 and not checkpointing)
        fp32 = base.item == FP32
        each = [
            sum_bytes(n * base.hidden * base.item, mesh.tp, fp32=fp32, gloo=gloo)
            for n in stream.rows
        ]
        sent["tp.sum"] = (sums * len(each), sums * sum(each))
        chunks = [c for n in stream.rows for c in _chunks(n, stream.chunk_rows)]
        sent["tp.gather"] = (len(chunks), 3 * FP32 * sum(chunks) * (mesh.tp - 1))
    return sent


def optim_step_sent(
    parts: Sequence[Part], mesh: MeshShape, dp_index: int, *, gloo: bool = False
) -> Sent:
    """Return what one optimizer step of these adapters sends."""
    if mesh.size == 1 or not parts:
        return {}
    passed = [_pass_sent(one, mesh, dp_index, gloo=gloo) for one in _passes(parts)]
    return {name: _sum(sent.get(name, (0, 0)) for sent in passed) for name in passed[0]}


def _pass_sent(parts: Sequence[Part], mesh: MeshShape, dp_index: int, *, gloo: bool) -> Sent:
    others, columns = mesh.dp - 1, sum(part.slice_size for part in parts)
    sent: Sent = {}
    if mesh.dp > 1:
        sent["dp.exchange"] = (1, FP32 * columns * others)
        published = sum(part.slice_size * part.item for part in parts)
        sent["dp.gather"] = (1, (published + -published % 8) * others)
    front = FP32 * sum(part.front(dp_index) for part in parts)
    if mesh.tp > 1 and front:
        sent["tp.sum"] = (1, sum_bytes(front, mesh.tp, gloo=gloo))
    norms = sum_bytes(8 * len(parts), mesh.size, fp32=False, gloo=gloo)
    sent["world.sum"] = (1, norms)
    return sent


def optim_step_peak(parts: Sequence[Part], mesh: MeshShape, dp_index: int) -> int:
    """Return the bytes that a step takes for itself: flat buffers of its largest pass."""
    return max((_pass_peak(one, mesh, dp_index) for one in _passes(parts)), default=0)


def _pass_peak(parts: Sequence[Part], mesh: MeshShape, dp_index: int) -> int:
    if mesh.dp == 1:
        return FP32 * sum(part.whole for part in parts) if mesh.tp > 1 else 0
    flat = mesh.dp * sum(part.slice_size for part in parts)
    return FP32 * (2 * flat + sum(part.own(dp_index) for part in parts))


def _passes(parts: Sequence[Part]) -> list[Sequence[Part]]:
    return [parts[together] for together in passes([part.length for part in parts])]


def _sum(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    calls, sizes = zip(*counts, strict=True)
    return sum(calls), sum(sizes)


def total(sent: Sent) -> tuple[int, int]:
    """Return the collectives and bytes of all names together."""
    return sum(calls for calls, _ in sent.values()), sum(size for _, size in sent.values())


def _shares(unit: Sequence[tuple[int, int]], dp: int) -> int:
    """Return the size of a rank's share of parameters, each cut along its first dimension."""
    return sum(-(-n // dp) * rest for n, rest in unit)


def _chunks(rows: int, size: int) -> list[int]:
    return [min(size, rows - start) for start in range(0, rows, size)]


def _times(count: int, calls: int, num_bytes: int) -> tuple[int, int]:
    return count * calls, count * num_bytes
