"""What goes between a control process and the processes of its engine, beside the types of `types`.

P parameters of an adapter, S shares of a gradient.
"""

import json
from dataclasses import asdict, dataclass

from manylora.lora.layout import Layout
from manylora.lora.sites import Site
from manylora.lora.state import AdapterState
from manylora.types import AdapterSpec
from manylora.types.data import Array

# Verbs of the engine that a control process may call, beside `open` and `stop`.
VERBS = frozenset(
    {
        "create", "restore", "unload", "poison", "state", "snapshot", "snapshot_state",
        "install_snapshot", "drop_snapshot", "base_weight", "forward_backward", "optim_step",
        "admit", "decode", "cancel",
    }
)  # fmt: skip

# Set in actors of a Ray cluster, whose accounts say how many threads they may have.
BY_RAY = "MANYLORA_BY_RAY"


@dataclass(frozen=True, slots=True)
class Hello:
    """How a process of an engine presents itself.

    Attributes:
        world_rank, world_size: which of how many.
        generation: how often its group was started before; processes of one generation belong
            together.
        host, pid: where it is. code: the digest of its code.
    """

    world_rank: int
    world_size: int
    generation: int
    host: str
    pid: int
    code: str


@dataclass(frozen=True, slots=True)
class About:
    """An engine that is open.

    Attributes:
        name, folder, fingerprint, context_length, vocab_size: see `models.BaseModel`.
        sites: where adapters can act.
        free_bytes: of a process's device, or its share of the host's memory; the least of all.
    """

    name: str
    folder: str
    fingerprint: str
    context_length: int
    vocab_size: int
    sites: tuple[Site, ...]
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Vectors:
    """An `AdapterState` without what both sides know: its settings and its layout.

    Attributes:
        weights, exp_avg, exp_avg_sq: fp32 [P]. grad: fp32 [S, P].
    """

    weights: Array
    exp_avg: Array | None
    exp_avg_sq: Array | None
    grad: Array | None
    step: int
    draws: int
    poison: str | None

    @classmethod
    def of(cls, state: AdapterState) -> "Vectors":
        """Those of a state, not copied."""
        return cls(
            state.weights, state.exp_avg, state.exp_avg_sq, state.grad, state.step, state.draws,
            state.poison,
        )  # fmt: skip

    def state(self, spec: AdapterSpec, layout: Layout) -> AdapterState:
        """The state of an adapter with these settings."""
        return AdapterState(
            spec, layout, self.weights, self.exp_avg, self.exp_avg_sq, self.grad, self.step,
            self.draws, self.poison,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which processes to start, and whom they shall serve.

    Attributes:
        address, secret: of the control process.
        base, device: what they will open, and where; see `Opening`.
        tp: each run of so many processes should share a machine.
    """

    address: str
    secret: str
    num_processes: int
    base: str
    device: str = "auto"
    tp: int = 1

    def line(self) -> bytes:
        """As one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> "Assignment":
        """What `line` gave."""
        return cls(**json.loads(line))
