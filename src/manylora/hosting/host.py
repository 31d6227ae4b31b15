"""Engines have queues before them, to which every client submits."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from manylora.hosting.engine_protocol import EngineProtocol, Resident
from manylora.hosting.pager import Pager
from manylora.hosting.placement import Placement
from manylora.hosting.state_files import read_state, weights_only, write_state
from manylora.lora.state import AdapterState
from manylora.scheduler import BatchReport, Call, Operation, OperationQueue, Residency, Worker
from manylora.types import AdapterSpec, EngineLost
from manylora.types.machine import free_host_bytes

log = logging.getLogger("manylora.api")

# Of the memory that is free once the base is open: for adapters in the engine, for their states on
# their way in and out, and for snapshots. The rest is for activations and caches.
ADAPTER_SHARE, HOST_SHARE, SNAPSHOT_SHARE = 0.3, 0.15, 0.1

PagerCall = Callable[[Pager], Any]


class HostedEngine:
    """A hosted engine has a pager, a queue and a worker; only here are they put together.

    Attributes:
        engine: is open; its opener closes it.
        pager: the engine's verbs over adapters in memory or on disk.
        queue: the operations of the adapters that live here.
        worker: the thread that runs them.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        folder: Path | None,
        *,
        max_resident: int | None,
        neighbours: int,
        token_budget: int = 4096,
        before_save: Callable[[], None] = lambda: None,
        on_saved: Callable[[str, int], None] = lambda name, position: None,
        observe: Callable[[BatchReport], None] = lambda report: None,
        apart: Callable[[Operation], bool] = lambda operation: False,
    ):
        """Put a queue before an engine.

        Args:
            folder: for adapters' states and snapshots; None = all of them stay in the engine.
            max_resident: adapters in the engine at once; None = what measured memory allows.
            neighbours: hosted engines in this process, this one included.
            token_budget: that the engine was opened with.
            before_save, on_saved: see `Pager`.
            observe: told of each batch that was run.
            apart: see `OperationQueue`.
        """
        self.engine = engine
        on_device, on_host = engine.free_bytes, free_host_bytes() // neighbours
        adapters, snapshots = Residency(), Residency()
        if folder is not None:
            adapters = Residency(
                max_count=max_resident,
                max_bytes=int(on_device * ADAPTER_SHARE) if max_resident is None else None,
            )
            snapshots = Residency(max_bytes=int(on_device * SNAPSHOT_SHARE))
        self.pager = Pager(
            engine,
            folder,
            adapters=adapters,
            snapshots=snapshots,
            host_bytes=int(on_host * HOST_SHARE),
            before_save=before_save,
            on_saved=on_saved,
        )
        self.queue = OperationQueue(token_budget, max_adapters=max_resident, apart=apart)
        self.worker = Worker(self.queue, self.pager, observe=observe)

    def abandon(self) -> None:
        """Stop, after the engine was lost; see `Host.abandon`."""
        self.queue.close()
        self.queue.cancel_waiting()
        self.worker.join()
        self.pager.close()

    def close(self, *, cancel: bool) -> None:
        """Run what is queued, save what is not on disk, and stop; see `Host.close`."""
        self.queue.close()
        if cancel:
            self.queue.cancel_waiting()
            self.worker.drop_samples()
        self.worker.join()
        try:
            if self.worker.loss is None:
                self.pager.save_all()
        except EngineLost as error:
            log.error("adapters could not be saved: %s", error)
        self.pager.close()


class Host:
    """A host shows the engines on one base as one: each adapter lives with one of them.

    Engines share nothing, so none waits for another. What an adapter gets does not depend on its
    neighbours, so it does not depend on where it lives either. It is thread-safe.

    Attributes:
        units: the engines, each with its own queue.
        placement: which adapter and which snapshot lives with which of them.
    """

    def __init__(
        self,
        engines: Sequence[EngineProtocol],
        folder: Path | None = None,
        *,
        max_resident: int | None = None,
        **settings: Any,
    ):
        """Put a queue before each engine. `max_resident` counts the adapters of all engines
        together; the other settings are those of a `HostedEngine`."""
        count = len(engines)
        each = None if max_resident is None else max(1, max_resident // count)
        self.units = [
            HostedEngine(engine, folder, max_resident=each, neighbours=count, **settings)
            for engine in engines
        ]
        self.placement = Placement(count)

    @property
    def engine(self) -> EngineProtocol:
        """This is one of the engines, for what all of them have in common."""
        return self.units[0].engine

    # -- what clients ask -------------------------------------------------------------------------

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation behind the others of its adapter."""
        return self.units[self.placement.of_operation(operation)].queue.submit(operation)

    def call(
        self, adapter: str | None, run: PagerCall, *, tenant: str = "", seq: int = 0
    ) -> Future[Any]:
        """Queue something that needs an engine for itself, in its adapter's turn if it has one.
        `run` is given what the engine's thread alone may use."""
        return self._call(self.placement.of_adapter(adapter), adapter, run, tenant, seq)

    def snapshot(
        self, adapter: str, snapshot: str, *, tenant: str = "", seq: int = 0
    ) -> Future[None]:
        """Queue the freezing of a copy of an adapter's weights."""
        number = self.placement.add_snapshot(snapshot, adapter)
        return self._call(
            number, adapter, lambda pager: pager.snapshot(adapter, snapshot, seq), tenant, seq
        )

    def install_snapshot(
        self, adapter: str, snapshot: str, state: AdapterState, *, tenant: str = ""
    ) -> Future[None]:
        """Queue the making of a snapshot of an adapter from a state that was read from disk."""
        number = self.placement.add_snapshot(snapshot, adapter)
        return self._call(
            number, adapter, lambda pager: pager.snapshots.install(snapshot, state), tenant
        )

    def drop_snapshot(
        self, snapshot: str, *, adapter: str | None = None, tenant: str = ""
    ) -> Future[None]:
        """Queue the end of a snapshot, in its adapter's turn if one is named."""
        number = self.placement.forget_snapshot(snapshot)
        return self._call(number, adapter, lambda pager: pager.drop_snapshot(snapshot), tenant)

    def unload(
        self, adapter: str, *, tenant: str = "", then: Callable[[], Any] = lambda: None
    ) -> Future[None]:
        """Queue the end of an adapter; its name is free again, its snapshots stay. `then` is called
        on the engine's thread once the adapter is gone."""

        def run(pager: Pager) -> None:
            pager.unload(adapter)
            then()

        return self._call(self.placement.forget_adapter(adapter), adapter, run, tenant)

    def _call(
        self, number: int, adapter: str | None, run: PagerCall, tenant: str, seq: int = 0
    ) -> Future[Any]:
        unit = self.units[number]
        return unit.queue.submit(Call(adapter, lambda: run(unit.pager), tenant=tenant, seq=seq))

    # -- what is where ----------------------------------------------------------------------------

    def resident(self, name: str) -> Resident:
        """Return an adapter that its engine holds."""
        return self.units[self.placement.of_adapter(name)].engine.adapters[name]

    def state_folder(self, name: str) -> Path:
        """Return where an adapter's state lies when it is on disk."""
        return self.units[0].pager.state_folder(name)

    def snapshot_folder(self, snapshot: str) -> Path:
        """Return where a snapshot lies on disk."""
        return self.units[0].pager.snapshots.folder_of(snapshot)

    def counts(self) -> dict[str, int]:
        """Return how many adapters and snapshots are where; see `Pager.counts`."""
        counts = [unit.pager.counts() for unit in self.units]
        return {place: sum(one[place] for one in counts) for place in counts[0]}

    def waiting(self, tenant: str) -> tuple[int, int]:
        """Return how many operations of a tenant wait, and their tokens."""
        counts, tokens = zip(*(unit.queue.waiting(tenant) for unit in self.units), strict=True)
        return sum(counts), sum(tokens)

    def losses(self) -> list[tuple[Operation, EngineLost]]:
        """Return what ran when an engine was lost, and how it was; empty while all are there."""
        workers = [(unit.worker, unit.worker.loss) for unit in self.units]
        return [(one, loss) for worker, loss in workers if loss for one in worker.lost_with]

    # -- states in files --------------------------------------------------------------------------

    def read(self, folder: Path, *, spec: AdapterSpec, moments: bool, called: str) -> AdapterState:
        """Read an adapter's state from its files. Raises CheckpointDamaged, CheckpointMismatch.

        Args:
            spec: the settings that it must have.
            moments: with the optimizer's state and counters; without, weights only.
            called: what an error calls the folder.
        """
        state = read_state(self.engine, folder, spec=spec, called=called).state
        return state if moments else weights_only(state)

    def adopt(
        self, name: str, folder: Path, *, spec: AdapterSpec, moments: bool, called: str
    ) -> None:
        """Copy a state to where an adapter of that name will look for its own. Any thread may.
        Raises CheckpointDamaged, CheckpointMismatch, SaveFailed."""
        state = self.read(folder, spec=spec, moments=moments, called=called)
        write_state(self.engine, self.state_folder(name), state, position=0)

    # -- the end ----------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Stop, after an engine was lost: what the engines held is not saved; what was on its way
        to disk gets there."""
        self._each(HostedEngine.abandon)

    def close(self, *, cancel: bool) -> None:
        """Run what is queued (or, with `cancel`, drop what has not started and what is decoding),
        save every state that is not on disk, and stop."""
        self._each(lambda unit: unit.close(cancel=cancel))

    def _each(self, act: Callable[[HostedEngine], None]) -> None:
        """Do something to all at once, because each waits for what its engine still has to do."""
        with ThreadPoolExecutor(len(self.units)) as pool:
            others = pool.map(act, self.units[1:])
            act(self.units[0])  # in this thread: Ctrl-C reaches a single engine
            list(others)
