"""The formulas of `mesh_formulas` say what real bases need on real meshes; nothing is measured.

Seconds are bytes by the vendors' bandwidths and products by the vendors' rates, so each is a lower
bound, and only their order tells anything: which of them the others wait for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.mesh_formulas import (
    Base,
    Part,
    Sent,
    Stream,
    activations,
    base_held,
    forward_backward_sent,
    gathered,
    optim_step_peak,
    optim_step_sent,
    part,
    total,
)
from manylora.engine.head_chunks import chunk_rows
from manylora.models.quantized import BITS
from manylora.types.mesh_shape import MeshShape
from manylora.types.weight_forms import Quantization

NODE = 8  # GPUs that NVLink joins
NVLINK, NETWORK = 450e9, 50e9  # bytes a second, each way, of one GPU: NVLink 4, 400 Gb/s
PRODUCTS = 989e12  # bf16 operations a second of an H100 or H200, without sparsity
MEMORIES = {"80 GB": 80e9, "141 GB": 141e9}
# Share of the memory for what is not counted: the allocator's gaps, workspaces, NCCL's buffers.
RESERVED = 0.1
TOKENS = 8192  # of one micro-batch on one dp rank
BF16 = 2
LORA_RANKS = (16, 64)
STEPPING = 16  # adapters in the example of an optimizer step


@dataclass(frozen=True, slots=True)
class Model:
    """A `Model` is a base by its public configuration, and the meshes for which it is planned."""

    name: str
    base: Base
    meshes: dict[int, tuple[str, ...]]


DENSE: dict[int, tuple[str, ...]] = {8: ("dp=8", "tp=8"), 64: ("dp=64", "dp=8,tp=8")}
MODELS = (
    Model("Llama-3.1-8B", Base(4096, 32, 32, 8, 128, 14336, 128256), DENSE),
    Model("Llama-3.3-70B", Base(8192, 80, 64, 8, 128, 28672, 128256), DENSE),
    Model(
        "Qwen3-235B-A22B",
        Base(4096, 94, 64, 4, 128, 1536, 151936, experts=128, active=8, head_norms=True),
        {8: ("dp=8",), 64: ("dp=64",)},
    ),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A `Case` is a base on a mesh.

    Attributes:
        tokens: tokens of a micro-batch.
    """

    model: Model
    mesh: MeshShape
    tokens: int = TOKENS

    @property
    def base(self) -> Base:
        return self.model.base

    @property
    def nodes(self) -> int:
        return max(1, self.mesh.size // NODE)

    def gathered(self) -> int:
        """Return the bytes gathered at a time.

        They are three blocks (in use, the next, what that one is copied out of), or two heads.
        """
        units = gathered(self.base, self.mesh)
        return max(3 * units["block"], 2 * units["table"]) + self.made_whole()

    def made_whole(self) -> int:
        """Return bytes of the largest layer's weight, which a product makes of codes and scales."""
        if not self.base.bits:
            return 0
        return max(n * k for k, n, _ in self.base.linears()) // self.mesh.tp * self.base.item

    def activations(self) -> int:
        """Return the activations' bytes of a micro-batch, blocks recomputed."""
        base, tp = self.base, self.mesh.tp
        each = activations(_dense(base), tp, LORA_RANKS[0], base.layers)
        # Copies for the experts and back, and their gradients; not counted anywhere, an estimate.
        return self.tokens * (each + 4 * base.active * base.hidden * base.item)

    def left(self, memory: float) -> float:
        """Return the bytes left for adapters, and for activations or a step's buffers."""
        return memory * (1 - RESERVED) - base_held(self.base, self.mesh)

    def part(self, rank: int) -> Part:
        return part(self.base, rank, BF16, self.mesh)

    def held(self, rank: int) -> int:
        """Return the bytes of a resident adapter."""
        return sum(self.part(rank).held(0).values())

    def stepping(self, rank: int) -> int:
        """Return the bytes of buffers while an adapter steps alone."""
        return self.buffers(rank, 1)

    def buffers(self, rank: int, count: int) -> int:
        """Return the bytes of buffers while `count` adapters step in one call."""
        return optim_step_peak([self.part(rank)] * count, self.mesh, 0)

    def most(self, rank: int, memory: float) -> str:
        """Say how many adapters are resident at most, all of which may step in one call."""
        left, held = self.left(memory), self.held(rank)
        most = int((left - self.gathered() - self.activations()) // held)
        if most < 0:
            return "does not fit"
        while most * held + self.buffers(rank, most) > left:
            most -= 1
        return f"{most}"

    # -- time, at the vendors' numbers ------------------------------------------------------------

    def sent(self) -> Sent:
        """Return what one micro-batch sends."""
        longest = -(-self.base.vocab // self.mesh.tp)
        rows = chunk_rows(longest, torch.bfloat16, capped=False)
        # A result is one number a token, and few more.
        stream = Stream([self.tokens], rows, self.tokens)
        return forward_backward_sent(self.base, self.mesh, stream, checkpointing=True)

    def gather_seconds(self) -> tuple[float, float]:
        """Return the seconds of gathers over NVLink, and over the network."""
        sent = self.sent().get("dp.blocks", (0, 0))[1]
        return self._nvlink(sent), self._across(sent) / NETWORK

    def sum_seconds(self) -> float:
        """Return the seconds of tp's sums and gathers over NVLink."""
        return sum(self.sent().get(name, (0, 0))[1] for name in ("tp.sum", "tp.gather")) / NVLINK

    def product_seconds(self, tokens: int | None = None) -> float:
        """Return the seconds of products.

        These are forward, forward again and the gradient of the inputs, each with 2 operations a
        parameter.
        """
        parameters = self.base.parameters(of_a_token=True)
        tokens = self.tokens if tokens is None else tokens
        return 6 * parameters * tokens / self.mesh.tp / PRODUCTS

    def covering(self) -> int:
        """Return from how many tokens a micro-batch's products take as long as its gathers."""
        return round(max(self.gather_seconds()) / self.product_seconds(1))

    def bottleneck(self) -> str:
        nvlink, network = self.gather_seconds()
        times = {
            "products": self.product_seconds(),
            "gathers, NVLink": nvlink,
            "gathers, network": network,
            "sums, NVLink": self.sum_seconds(),
        }
        return max(times, key=lambda name: times[name])

    def step(self, count: int, rank: int) -> tuple[Sent, float]:
        """Return what an optimizer step of `count` adapters sends, and the seconds of that."""
        mesh = self.mesh
        sent = optim_step_sent([self.part(rank)] * count, mesh, 0)
        exchanged, published = (
            sent.get(f"dp.{kind}", (0, 0))[1] for kind in ("exchange", "gather")
        )
        near = min(mesh.dp, NODE // mesh.tp)
        far = (mesh.dp - near) / max(mesh.dp - 1, 1)
        network = (exchanged * far + self._across(published)) / NETWORK
        return sent, max(network, self._nvlink(exchanged + published)) + (
            sent.get("tp.sum", (0, 0))[1] / NVLINK
        )

    def _across(self, gathers: int) -> float:
        """Return what each GPU takes into its node of gathered bytes: the others' shares, once."""
        whole = gathers * self.mesh.dp / max(self.mesh.dp - 1, 1)
        return whole * (1 - 1 / self.nodes) * self.mesh.tp / NODE

    def _nvlink(self, num_bytes: float) -> float:
        """Return the seconds over NVLink; 0 where an axis has one rank in each node."""
        return num_bytes / NVLINK if min(self.mesh.dp, NODE // self.mesh.tp) > 1 else 0.0


def cases(tokens: int = TOKENS) -> Iterator[Case]:
    """Yield every base on its meshes."""
    for model in MODELS:
        for meshes in model.meshes.values():
            for mesh in meshes:
                yield Case(model, MeshShape.parse(mesh), tokens)


def plan(tokens: int = TOKENS) -> str:
    """Write the tables of docs/scale.md in Markdown."""
    chosen = list(cases(tokens))
    return "\n\n".join(
        [
            f"Bases and adapters in bf16, {tokens:,} tokens of a micro-batch on each dp rank, "
            f"blocks recomputed; {RESERVED:.0%} of the memory left free. GB = 10⁹ bytes, of one "
            "GPU.",
            _memory(chosen),
            "Resident adapters at most; all of them may step in one call.",
            _most(chosen),
            "One micro-batch, of one GPU: bytes counted by formula, milliseconds at the vendors' "
            f"numbers (NVLink {NVLINK / 1e9:.0f} GB/s and network {NETWORK / 1e9:.0f} GB/s each "
            f"way, {PRODUCTS / 1e12:.0f} TFLOP/s).",
            _sending(chosen),
            f"An optimizer step of {STEPPING} adapters of rank {LORA_RANKS[0]}, in one call.",
            _steps(chosen),
        ]
    )


def plan_quantized(kind: Quantization, tokens: int = TOKENS) -> str:
    """Write the tables of memory again, with dense bases' linear layers in fewer bits."""
    chosen: list[Case] = []
    for model in MODELS:
        if not model.base.experts:
            fewer = replace(model, base=replace(model.base, bits=BITS[kind]))
            meshes = ("dp=1", *model.meshes[NODE])
            chosen += [Case(fewer, MeshShape.parse(mesh), tokens) for mesh in meshes]
    return "\n\n".join(
        [
            f"The same with `quantization: {kind}`; gathered: with the weight of one layer, made "
            "whole.",
            _memory(chosen),
            _most(chosen),
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _memory(chosen: Sequence[Case]) -> str:
    head = ["base, mesh", "parameters", "gathered", "activations"]
    head += [f"adapter, rank {r}: resident" for r in LORA_RANKS]
    head += [f"rank {r}: more, while it steps" for r in LORA_RANKS]
    rows = []
    for case in chosen:
        sizes = [base_held(case.base, case.mesh), case.gathered(), case.activations()]
        sizes += [case.held(rank) for rank in LORA_RANKS]
        sizes += [case.stepping(rank) for rank in LORA_RANKS]
        rows.append([_title(case), *(f"{size / 1e9:.2f}" for size in sizes)])
    return table(head, rows)


def _most(chosen: Sequence[Case]) -> str:
    head = ["base, mesh", *(f"rank {rank}, {name}" for rank in LORA_RANKS for name in MEMORIES)]
    rows = [
        [
            _title(case),
            *(case.most(rank, size) for rank in LORA_RANKS for size in MEMORIES.values()),
        ]
        for case in chosen
    ]
    return table(head, rows)


def _sending(chosen: Sequence[Case]) -> str:
    head = ["base, mesh", "collectives", "gathers, GB", "sums, GB", "gathers: NVLink, ms"]
    head += ["network, ms", "sums, ms", "products, ms", "the longest", "tokens that cover gathers"]
    rows = []
    for case in chosen:
        sent, (nvlink, network) = case.sent(), case.gather_seconds()
        sums = sum(sent.get(name, (0, 0))[1] for name in ("tp.sum", "tp.gather"))
        seconds = (nvlink, network, case.sum_seconds(), case.product_seconds())
        row = [_title(case), f"{total(sent)[0]:,}", f"{sent.get('dp.blocks', (0, 0))[1] / 1e9:.1f}"]
        row += [f"{sums / 1e9:.1f}", *(f"{1e3 * one:,.0f}" for one in seconds), case.bottleneck()]
        rows.append([*row, f"{case.covering():,}" if case.mesh.dp > 1 else "–"])
    return table(head, rows)


def _steps(chosen: Sequence[Case]) -> str:
    rows = []
    for case in chosen:
        sent, seconds = case.step(STEPPING, LORA_RANKS[0])
        calls, size = total(sent)
        peak = case.buffers(LORA_RANKS[0], STEPPING)
        line = [f"{calls}", f"{size / 1e9:.2f}", f"{peak / 1e9:.1f}", f"{1e3 * seconds:.0f}"]
        rows.append([_title(case), *line])
    return table(["base, mesh", "collectives", "sent, GB", "buffers, GB", "ms"], rows)


def _title(case: Case) -> str:
    return f"{case.model.name}, {case.mesh.size} GPU{'s' * (case.mesh.size > 1)}: {case.mesh}"


def _dense(base: Base) -> Base:
    """Return a dense base whose MLP is as wide as a token's experts together."""
    return replace(base, mlp=base.mlp * max(base.active, 1), experts=0, active=0)
