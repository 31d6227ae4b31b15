"""One engine, one queue, one worker: what every door submits to."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from manylora.hosting.engine_protocol import EngineProtocol, Resident
from manylora.hosting.pager import Pager
from manylora.hosting.state_files import read_state, weights_only, write_state
from manylora.lora.state import AdapterState
from manylora.scheduler import BatchReport, Call, Operation, OperationQueue, Residency, Worker
from manylora.types import AdapterSpec, EngineLost
from manylora.types.machine import free_host_bytes

log = logging.getLogger("manylora.api")

# Of the memory that is free once the base is open: for adapters in the engine, for their states on
# their way in and out, and for snapshots. The rest is for activations and caches.
ADAPTER_SHARE, HOST_SHARE, SNAPSHOT_SHARE = 0.3, 0.15, 0.1


class Host:
    """A base, the adapters on it (in memory or on disk), and the queue before them.

    The one place where an engine, a queue and a worker are put together.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        folder: Path | None = None,
        *,
        token_budget: int = 4096,
        max_resident: int | None = None,
        before_save: Callable[[], None] = lambda: None,
        on_saved: Callable[[str, int], None] = lambda name, position: None,
        observe: Callable[[BatchReport], None] = lambda report: None,
        apart: Callable[[Operation], bool] = lambda operation: False,
        neighbours: int = 1,
    ):
        """Put a queue before an engine.

        Args:
            engine: open, and closed by whoever opened it.
            folder: for adapters' states and snapshots; None = all of them stay in the engine.
            token_budget: that the engine was opened with.
            max_resident: adapters in the engine at once; None = what measured memory allows.
            before_save, on_saved: see `Pager`.
            observe: told of each batch that was run.
            apart: see `OperationQueue`.
            neighbours: hosts in this process, this one included.
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
            self.engine,
            folder,
            adapters=adapters,
            snapshots=snapshots,
            host_bytes=int(on_host * HOST_SHARE),
            before_save=before_save,
            on_saved=on_saved,
        )
        self.queue = OperationQueue(token_budget, max_adapters=max_resident, apart=apart)
        self.worker = Worker(self.queue, self.pager, observe=observe)

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation behind the others of its adapter."""
        return self.queue.submit(operation)

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
        """Queue something that needs the engine for itself, in its adapter's turn if it has one.

        Args:
            run: is given what the engine's thread alone may use.
            makes, drops: the name of a snapshot of which this is the beginning, or the end.
            last: nothing will be asked of the adapter any more. (These three tell one of several
                hosts where what comes belongs; see `Hosts`.)
        """
        return self.queue.submit(Call(adapter, lambda: run(self.pager), tenant=tenant, seq=seq))

    def resident(self, name: str) -> Resident:
        """An adapter that the engine holds."""
        return self.engine.adapters[name]

    def state_folder(self, name: str) -> Path:
        """Where an adapter's state lies when it is on disk."""
        return self.pager.state_folder(name)

    def snapshot_folder(self, snapshot: str) -> Path:
        """Where a snapshot lies on disk."""
        return self.pager.snapshot_folder(snapshot)

    def counts(self) -> dict[str, int]:
        """How many adapters and snapshots are where; see `Pager.counts`."""
        return self.pager.counts()

    def waiting(self, tenant: str) -> tuple[int, int]:
        """How many operations of a tenant wait, and their tokens."""
        return self.queue.waiting(tenant)

    def losses(self) -> list[tuple[Operation, EngineLost]]:
        """What was running when the engine was lost, and how it was; empty while it is there."""
        loss = self.worker.loss
        return [] if loss is None else [(one, loss) for one in self.worker.lost_with]

    def read(self, folder: Path, *, spec: AdapterSpec, moments: bool, called: str) -> AdapterState:
        """An adapter's state from its files.

        Args:
            spec: the settings that it must have.
            moments: with the optimizer's state and counters; without, weights only.
            called: what an error calls the folder.

        Raises:
            CheckpointDamaged, CheckpointMismatch
        """
        state = read_state(self.engine, folder, spec=spec, called=called).state
        return state if moments else weights_only(state)

    def adopt(
        self, name: str, folder: Path, *, spec: AdapterSpec, moments: bool, called: str
    ) -> None:
        """Copy a state to where an adapter of that name will look for its own. Any thread.

        Raises:
            CheckpointDamaged, CheckpointMismatch, SaveFailed
        """
        state = self.read(folder, spec=spec, moments=moments, called=called)
        write_state(self.engine, self.state_folder(name), state, position=0)

    def abandon(self) -> None:
        """Stop, after the engine was lost: what it held is not saved; what was on its way to disk
        gets there."""
        self.queue.close()
        self.queue.cancel_waiting()
        self.worker.join()
        self.pager.close()

    def close(self, *, cancel: bool) -> None:
        """Run what is queued (or, with `cancel`, drop what has not started and what is decoding),
        save every state that is not on disk, and stop."""
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
