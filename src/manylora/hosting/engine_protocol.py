"""The engine's verbs are declared once, for `engine.Engine` here and `RemoteEngine` elsewhere.

A verb that the worker calls is declared in `scheduler.Runner`, every other one here. What a remote
engine can be asked (`VERBS`) is derived from both; the type checker and
tests/unit/hosting/test_engine_protocol.py hold the engines and the pager against them.
"""

from collections.abc import Mapping
from inspect import isfunction
from typing import Any, Protocol

from manylora.lora.layout import Layout
from manylora.lora.sites import Site
from manylora.lora.state import AdapterState
from manylora.scheduler import Runner
from manylora.types import AdapterSpec


class OpenBase(Protocol):
    """An `OpenBase` is the base that is open; see `models.BaseModel`."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def context_length(self) -> int: ...


class Resident(Protocol):
    """A `Resident` is an adapter that the engine holds."""

    @property
    def spec(self) -> AdapterSpec: ...

    @property
    def layout(self) -> Layout: ...


class Frozen(Resident, Protocol):
    """A `Frozen` is a snapshot that the engine holds."""

    @property
    def num_bytes(self) -> int: ...


class EngineProtocol(Runner, Protocol):
    """The hosting needs this of an engine; `engine.Engine` documents each verb."""

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


# The verbs by their names: what the processes of an engine can be asked.
VERBS = frozenset(
    name
    for protocol in (Runner, EngineProtocol)
    for name, member in vars(protocol).items()
    if isfunction(member) and not name.startswith("_")
)
