"""What the api needs of an engine, in this process (`engine.Engine`) or others (`RemoteEngine`)."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from manylora.lora.layout import Layout
from manylora.lora.sites import Site
from manylora.lora.state import AdapterState
from manylora.types import (
    AdapterSpec,
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    OptimStep,
    OptimStepResult,
    Sample,
    SampleResult,
)


class OpenBase(Protocol):
    """The base that is open; see `models.BaseModel`."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def context_length(self) -> int: ...


class Resident(Protocol):
    """An adapter that the engine holds."""

    @property
    def spec(self) -> AdapterSpec: ...

    @property
    def layout(self) -> Layout: ...


class Frozen(Resident, Protocol):
    """A snapshot that the engine holds."""

    @property
    def num_bytes(self) -> int: ...


class EngineProtocol(Protocol):
    """The engine's verbs; see `engine.Engine`."""

    @property
    def base(self) -> OpenBase: ...

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def adapters(self) -> Mapping[str, Resident]: ...

    @property
    def snapshots(self) -> Mapping[str, Frozen]: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def free_bytes(self) -> int: ...

    @property
    def room_bytes(self) -> int: ...

    @property
    def decoding(self) -> int: ...

    def create(self, name: str, spec: AdapterSpec) -> Resident: ...

    def restore(self, name: str, state: AdapterState) -> Resident: ...

    def unload(self, name: str) -> None: ...

    def poison(self, name: str, reason: str) -> None: ...

    def state(self, name: str) -> AdapterState: ...

    def base_weight(self, site: str) -> Any: ...

    def snapshot(self, name: str, snapshot: str) -> None: ...

    def snapshot_state(self, snapshot: str) -> AdapterState: ...

    def install_snapshot(self, snapshot: str, state: AdapterState) -> None: ...

    def drop_snapshot(self, snapshot: str) -> None: ...

    def forward_backward(
        self, works: Sequence[ForwardBackward]
    ) -> Sequence[ForwardBackwardResult | ManyloraError]: ...

    def optim_step(
        self, steps: Sequence[OptimStep]
    ) -> Sequence[OptimStepResult | ManyloraError]: ...

    def admit(self, samples: Sequence[Sample]) -> Sequence[ManyloraError | None]: ...

    def decode(self, seconds: float) -> list[tuple[Sample, SampleResult | ManyloraError]]: ...

    def cancel(self, sample: Sample) -> None: ...
