"""These values go between a control process and an engine's processes, beside those of `types`.

P parameters of an adapter, S shares of a gradient.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from manylora.lora.layout import Layout, plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState
from manylora.types import AdapterSpec
from manylora.types.data import Array

# Set in actors of a Ray cluster, whose accounts say how many threads they may have.
BY_RAY = "MANYLORA_BY_RAY"


@dataclass(frozen=True, slots=True)
class Hello:
    """A `Hello` presents a process of an engine.

    Attributes:
        world_rank: which process it is.
        world_size: of how many.
        generation: how often its group was started before; processes of one generation belong
            together.
        host: the name of its machine.
        pid: its number there.
        code: the digest of its code.
    """

    world_rank: int
    world_size: int
    generation: int
    host: str
    pid: int
    code: str


@dataclass(frozen=True, slots=True)
class About:
    """An `About` describes an engine that is open.

    Attributes:
        name: the base as it was named.
        folder: where its files lie.
        fingerprint: tells whether a checkpoint belongs to it.
        context_length: tokens of its longest sequence.
        vocab_size: its tokens.
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
    """`Vectors` are an `AdapterState` without what both sides know: its settings and its layout.

    Attributes:
        weights, exp_avg, exp_avg_sq: fp32 [P].
        grad: fp32 [S, P].
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
        """Return the vectors of a state, not copied."""
        return cls(**{field.name: getattr(state, field.name) for field in fields(cls)})

    def state(self, spec: AdapterSpec, layout: Layout) -> AdapterState:
        """Return the state of an adapter with these settings."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return AdapterState(spec, layout, **own)


def packed(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return a verb's arguments as they travel: a state goes as its settings and its vectors."""
    pairs = ((a.spec, Vectors.of(a)) if isinstance(a, AdapterState) else (a,) for a in arguments)
    return tuple(one for pair in pairs for one in pair)


def unpacked(arguments: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """Return the arguments that were `packed`; a state's layout is planned on these sites."""
    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Vectors):
            spec: AdapterSpec = found.pop()
            argument = argument.state(spec, plan_layout(spec, resolve_targets(spec, sites)))
        found.append(argument)
    return found


@dataclass(frozen=True, slots=True)
class Assignment:
    """An assignment says which processes to start, and whom they shall serve.

    Attributes:
        address: of the control process.
        secret: what proves that a process belongs to its group.
        base: what they will open; see `Opening`.
        device: where they will open it.
        tp: each run of so many processes should share a machine.
    """

    address: str
    secret: str
    num_processes: int
    base: str
    device: str = "auto"
    tp: int = 1

    def line(self) -> bytes:
        """Return the assignment as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> "Assignment":
        """Return the assignment that `line` wrote."""
        return cls(**json.loads(line))
