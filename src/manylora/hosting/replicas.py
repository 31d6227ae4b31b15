"""Several engines behind one door: an adapter lives with one of them, and nobody need know which.

They share nothing, so none waits for another. What an adapter gets does not depend on its
neighbours, so it does not depend on where it lives either.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from manylora.hosting.engine_protocol import EngineProtocol, Resident
from manylora.hosting.host import Host
from manylora.hosting.pager import Pager
from manylora.lora.state import AdapterState
from manylora.scheduler import Operation
from manylora.types import AdapterSpec, EngineLost, Sample


class Replicas:
    """A host for each engine, as one; see `Host`. Thread-safe."""

    def __init__(self, hosts: Sequence[Host]):
        self._hosts = list(hosts)
        self._lock = threading.Lock()
        # With whom each lives, by its place in the list.
        self._adapters: dict[str, int] = {}
        self._snapshots: dict[str, int] = {}
        self._turn = 0

    @property
    def engine(self) -> EngineProtocol:
        """One of the engines, for what all of them have in common."""
        return self._hosts[0].engine

    def submit(self, operation: Operation) -> Future[Any]:
        """See `Host.submit`."""
        snapshot = operation.snapshot if isinstance(operation, Sample) else None
        with self._lock:
            if snapshot is not None and (snapshot in self._snapshots or operation.adapter is None):
                place = self._place(self._snapshots, snapshot)
            elif operation.adapter is not None:
                place = self._place(self._adapters, operation.adapter)
            else:
                place = self._next()
        return self._hosts[place].submit(operation)

    def call(
        self,
        adapter: str | None,
        run: Callable[[Pager], Any],
        *,
        tenant: str = "",
        seq: int = 0,
        makes: str | None = None,
        drops: str | None = None,
        last: bool = False,
    ) -> Future[Any]:
        """See `Host.call`."""
        with self._lock:
            if drops is not None:
                place = self._place(self._snapshots, drops)
                del self._snapshots[drops]
            elif adapter is not None:
                place = self._place(self._adapters, adapter)
            else:
                place = self._next()
            if makes is not None:
                self._snapshots[makes] = place
            if last and adapter is not None:
                del self._adapters[adapter]
        return self._hosts[place].call(adapter, run, tenant=tenant, seq=seq)

    def resident(self, name: str) -> Resident:
        """See `Host.resident`."""
        with self._lock:
            place = self._place(self._adapters, name)
        return self._hosts[place].resident(name)

    def state_folder(self, name: str) -> Path:
        """See `Host.state_folder`."""
        return self._hosts[0].state_folder(name)

    def snapshot_folder(self, snapshot: str) -> Path:
        """See `Host.snapshot_folder`."""
        return self._hosts[0].snapshot_folder(snapshot)

    def counts(self) -> dict[str, int]:
        """See `Host.counts`."""
        return dict(sum((Counter(host.counts()) for host in self._hosts), Counter()))

    def waiting(self, tenant: str) -> tuple[int, int]:
        """See `Host.waiting`."""
        counts, tokens = zip(*(host.waiting(tenant) for host in self._hosts), strict=True)
        return sum(counts), sum(tokens)

    def losses(self) -> list[tuple[Operation, EngineLost]]:
        """See `Host.losses`."""
        return [loss for host in self._hosts for loss in host.losses()]

    def read(self, folder: Path, *, spec: AdapterSpec, moments: bool, called: str) -> AdapterState:
        """See `Host.read`."""
        return self._hosts[0].read(folder, spec=spec, moments=moments, called=called)

    def adopt(
        self, name: str, folder: Path, *, spec: AdapterSpec, moments: bool, called: str
    ) -> None:
        """See `Host.adopt`."""
        self._hosts[0].adopt(name, folder, spec=spec, moments=moments, called=called)

    def abandon(self) -> None:
        """See `Host.abandon`."""
        self._each(Host.abandon)

    def close(self, *, cancel: bool) -> None:
        """See `Host.close`."""
        self._each(lambda host: host.close(cancel=cancel))

    # -- inside ---------------------------------------------------------------------------------

    def _each(self, act: Callable[[Host], None]) -> None:
        """At once, because each waits for what its engine still has to do."""
        with ThreadPoolExecutor(len(self._hosts)) as pool:
            for _ in pool.map(act, self._hosts):
                pass

    def _place(self, places: dict[str, int], name: str) -> int:
        """Where that one lives; one that is new goes where fewest are."""
        if name not in places:
            held, first = Counter(places.values()), self._next()
            count = len(self._hosts)
            places[name] = min(range(count), key=lambda i: (held[i], (i - first) % count))
        return places[name]

    def _next(self) -> int:
        """Each in turn."""
        self._turn = (self._turn + 1) % len(self._hosts)
        return self._turn


AnyHost = Host | Replicas


def host_of(
    engines: Sequence[EngineProtocol],
    folder: Path | None = None,
    *,
    max_resident: int | None = None,
    **settings: Any,
) -> AnyHost:
    """Put a queue before each engine, and all of them behind one door.

    Args:
        max_resident: adapters in all engines together.
        folder, settings: see `Host`.
    """
    count = len(engines)
    each = None if max_resident is None else max(1, max_resident // count)
    hosts = [
        Host(engine, folder, max_resident=each, neighbours=count, **settings) for engine in engines
    ]
    return hosts[0] if count == 1 else Replicas(hosts)
