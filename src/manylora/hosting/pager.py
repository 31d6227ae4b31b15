"""The pager brings adapters into the engine and takes them out, so more exist than fit.

An adapter is resident (in the engine), held (its state in host memory) or on disk, and comes back
by itself when an operation needs it. States, snapshots and checkpoints are written by one
background thread in the order in which they were asked for, so a state on disk never refers to a
snapshot that is not there yet, and training does not wait for the disk.
"""

import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from manylora.hosting.engine_protocol import EngineProtocol
from manylora.hosting.page import AdapterPage, PageState, bytes_of, file_name, settings_of
from manylora.hosting.snapshots import Snapshots
from manylora.hosting.state_files import read_state, write_state
from manylora.hosting.state_writer import Writer
from manylora.lora.state import AdapterState
from manylora.scheduler import Residency
from manylora.types import (
    AdapterExists,
    AdapterNotFound,
    AdapterSpec,
    EngineLost,
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    OptimStep,
    OptimStepResult,
    Sample,
    SampleResult,
)
from manylora.types.memory import adapter_bytes, admit_adapter

Result = TypeVar("Result")


class Pager:
    """A pager offers the verbs of a `scheduler.Runner` over any number of registered adapters.

    Verbs run on the engine's thread; `on_saved` is called on the writer's. `PageState` tells where
    an adapter is, and what moves it.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        folder: Path | None,
        *,
        adapters: Residency,
        snapshots: Residency,
        host_bytes: int,
        before_save: Callable[[], None] = lambda: None,
        on_saved: Callable[[str, int], None] = lambda name, position: None,
    ):
        """Nothing is registered yet.

        Args:
            folder: for states (`adapters/`) and snapshots (`snapshots/`); None = nothing leaves the
                engine, so `adapters` and `snapshots` have no limits.
            adapters, snapshots: how many may be in the engine at once.
            host_bytes: of states held in host memory, those that wait to be written included.
            before_save: called before an adapter's state is written; returns once everything that
                its operations brought is where it will be found again.
            on_saved: told the name and the position of each state that is whole on disk.
        """
        self.engine = engine
        self.adapters = adapters
        self.host_bytes = host_bytes
        self._folder = folder
        self._before_save, self._on_saved = before_save, on_saved
        self._pages: dict[str, AdapterPage] = {}
        self._held = Residency(max_bytes=host_bytes)
        self._lock = threading.Lock()
        self._writer = Writer(host_bytes)
        self.snapshots = Snapshots(engine, folder, snapshots, self._writer)

    # -- registering ------------------------------------------------------------------------------

    def create(self, name: str, spec: AdapterSpec) -> None:
        """Make a new adapter, resident at once so that wrong settings show. Raises AdapterExists,
        TargetError, DoesNotFit."""
        self._refuse_known(name)
        self._pages[name] = AdapterPage(PageState.UNMADE, spec)
        self._bring_first(name)

    def restore(self, name: str, state: AdapterState) -> None:
        """Make a new adapter that begins with a state, resident at once. Raises AdapterExists,
        DoesNotFit."""
        self._refuse_known(name)
        self._pages[name] = AdapterPage(PageState.HELD)
        self._hold(name, state)
        self._bring_first(name)

    def register(self, name: str, spec: AdapterSpec, position: int | None) -> None:
        """Register an adapter of this folder's earlier life; nothing is read before it is needed.

        `position` is that of its state on disk; None = it has none and starts anew from `spec`.
        """
        self._refuse_known(name)
        if position is None:
            self._pages[name] = AdapterPage(PageState.UNMADE, spec)
        else:
            self._pages[name] = AdapterPage(PageState.ON_DISK, position=position, saved=0, asked=0)

    def replace(self, name: str, state: AdapterState, position: int) -> None:
        """Put another state in an adapter's place."""
        self._page(name)
        self._forget_resident(name)
        self.adapters.drop(name)
        self._hold(name, state)
        self._advance(name, position)
        self.save(name)

    def unload(self, name: str) -> None:
        """Forget an adapter and delete its state on disk; its snapshots stay."""
        self._page(name)
        self._forget_resident(name)
        self._held.drop(name)
        del self._pages[name]
        if self._folder is not None:
            folder = self.state_folder(name)
            self._writer.write(lambda: shutil.rmtree(folder, ignore_errors=True), 0)

    def position(self, name: str) -> int:
        """Return `seq` of the last operation that the adapter has run."""
        return self._page(name).position

    def state_folder(self, name: str) -> Path:
        """Return where the adapter's state lies when it is on disk."""
        assert self._folder is not None
        return self._folder / "adapters" / file_name(name)

    # -- the engine's verbs -----------------------------------------------------------------------

    def forward_backward(
        self, works: Sequence[ForwardBackward]
    ) -> list[ForwardBackwardResult | ManyloraError]:
        """See `Engine.forward_backward`; an adapter that cannot be brought back is its error."""
        return self._run(works, self.engine.forward_backward)

    def optim_step(self, steps: Sequence[OptimStep]) -> list[OptimStepResult | ManyloraError]:
        """See `Engine.optim_step`."""
        return self._run(steps, self.engine.optim_step)

    def admit(self, samples: Sequence[Sample]) -> list[ManyloraError | None]:
        """See `Engine.admit`; weights that cannot be brought back are an error, never the base."""
        faults = self._bring(samples)
        sound = [sample for number, sample in enumerate(samples) if number not in faults]
        verdicts = iter(self.engine.admit(sound))
        return [faults[n] if n in faults else next(verdicts) for n in range(len(samples))]

    def decode(self, seconds: float) -> list[tuple[Sample, SampleResult | ManyloraError]]:
        """See `Engine.decode`."""
        return self.engine.decode(seconds)

    def cancel(self, sample: Sample) -> None:
        """See `Engine.cancel`."""
        self.engine.cancel(sample)

    def interrupt(self, sample: Sample) -> None:
        """See `Engine.interrupt`."""
        self.engine.interrupt(sample)

    @property
    def decoding(self) -> int:
        """So many sequences are in the decode loop."""
        return self.engine.decoding

    # -- states and snapshots ---------------------------------------------------------------------

    def poison(self, name: str, reason: str, position: int) -> None:
        """Have the adapter's next optimizer step refused, as after a failed forward_backward."""
        self._bring_one(name)
        self.engine.poison(name, reason)
        self._advance(name, position)

    def skip(self, name: str, position: int) -> None:
        """Pass over an operation that has nothing to do."""
        self._page(name)
        self._advance(name, position)

    def snapshot(self, name: str, snapshot: str, position: int) -> None:
        """Freeze a copy of the adapter's weights; it is on disk soon, if there is a folder."""
        self._bring_one(name)
        self.snapshots.take(name, snapshot)
        self._advance(name, position)

    def drop_snapshot(self, snapshot: str) -> None:
        """Forget a snapshot and delete it from disk."""
        self.snapshots.drop(snapshot)

    def whole_state(self, name: str) -> AdapterState:
        """Copy all that training goes on from, a gradient that waits for its step included."""
        self._bring_one(name)
        return self.engine.state(name)

    def state(self, name: str, position: int, *, moments: bool) -> AdapterState:
        """Return a copy of the state now, as a checkpoint keeps it: without a gradient that waits;
        without `moments`, weights and the count of steps only."""
        self._bring_one(name)
        state = self.engine.state(name)
        self._advance(name, position)
        if moments:
            return replace(state, grad=None, poison=None)
        return AdapterState(state.spec, state.layout, state.weights, step=state.step)

    def write(
        self, write: Callable[[], Result], state: AdapterState, *, quiet: bool = False
    ) -> "Future[Result]":
        """Have the writer write a state, after what it has in hand; see `Writer.write`."""
        return self._writer.write(write, bytes_of(state), quiet=quiet)

    def save(self, name: str) -> Future[Any] | None:
        """Have the adapter's state written, unless the newest is there or on its way."""
        page = self._page(name)
        if self._folder is None or page.asked == page.version:
            return None
        state = self.engine.state(name) if page.state is PageState.RESIDENT else page.content
        if not isinstance(state, AdapterState):
            # Its settings say all, or its state on disk cannot be read: it has done nothing since.
            return None
        position, version = page.position, page.version
        page.asked = version
        return self._writer.write(
            lambda: self._save_own(name, state, position, version), bytes_of(state)
        )

    def save_all(self) -> None:
        """Write every state that is not on disk, and wait for the writer."""
        for name in self._pages:
            self.save(name)
        self._writer.drain()

    def close(self) -> None:
        """Finish what the writer has in hand."""
        self._writer.close()

    def counts(self) -> dict[str, int]:
        """Count the adapters resident, held in host memory, and on disk only; snapshots too."""
        resident, held = len(self.adapters), len(self._held)
        return {
            "resident": resident,
            "held": held,
            "disk": len(self._pages) - resident - held,
            "snapshots": len(self.snapshots),
        }

    # -- inside -----------------------------------------------------------------------------------

    def _bring_first(self, name: str) -> None:
        """Bring in an adapter that is being made; if that fails, it is registered no longer."""
        try:
            self._bring_one(name)
        except BaseException:
            self._held.drop(name)
            del self._pages[name]
            raise

    def _run(
        self, operations: Sequence[Any], verb: Callable[[Sequence[Any]], Iterable[Any]]
    ) -> list[Any]:
        faults = self._bring(operations)
        sound = [one for number, one in enumerate(operations) if number not in faults]
        lost = any(isinstance(fault, EngineLost) for fault in faults.values())
        try:
            outcomes = iter(verb(sound) if sound else ())
        except EngineLost:
            lost = True
            raise
        finally:
            # A failed operation is over, too; after the loss of an engine operations run again.
            for operation in operations if not lost else ():
                # One of frozen weights leaves the adapter as it was: it counts if it is numbered.
                if operation.adapter in self._pages and (operation.seq or not _snapshot(operation)):
                    self._advance(operation.adapter, operation.seq)
        return [faults[n] if n in faults else next(outcomes) for n in range(len(operations))]

    def _bring(self, operations: Sequence[Any]) -> dict[int, ManyloraError]:
        """Bring in what operations run with; return what kept some from it, by their numbers."""
        snapshots = {one for operation in operations if (one := _snapshot(operation)) is not None}
        own = (operation.adapter for operation in operations if _snapshot(operation) is None)
        names = {name for name in own if name is not None}
        missing: dict[tuple[str | None, str | None], ManyloraError] = {}
        for name in sorted(names):
            try:
                self._bring_one(name, names)
            except ManyloraError as error:
                missing[name, None] = error
        for snapshot in sorted(snapshots):
            try:
                self.snapshots.bring(snapshot, snapshots)
            except ManyloraError as error:
                missing[None, snapshot] = error
        faults: dict[int, ManyloraError] = {}
        for number, operation in enumerate(operations):
            snapshot = _snapshot(operation)
            key = (operation.adapter if snapshot is None else None, snapshot)
            if key in missing:
                faults[number] = missing[key]
        return faults

    def _bring_one(self, name: str, keep: Collection[str] = ()) -> None:
        page = self._page(name)
        if page.state.in_engine:
            self.adapters.use(name)
            return
        content = page.content
        if content is None:
            called = f"the state of {name!r}"
            content = read_state(self.engine, self.state_folder(name), called=called).state
        spec, layout = settings_of(self.engine, content)
        others = self.adapters.names(keep) if self._folder else []
        room = self.engine.room_bytes + sum(self.adapters.size(other) for other in others)
        admit_adapter(name, spec.rank, layout.num_params, spec.dtype, room)  # before any goes
        needed = adapter_bytes(layout.num_params, spec.dtype)
        self._page_out(self.adapters.excess(keep, incoming=needed))
        for other in others:
            if other in self.adapters and needed > self.engine.room_bytes:
                self._page_out([other])
        if isinstance(content, AdapterSpec):
            adapter = self.engine.create(name, content)
            page.state = PageState.NEW
        else:
            adapter = self.engine.restore(name, content)
            page.state, page.content = PageState.RESIDENT, None
            self._held.drop(name)
        self.adapters.use(name, adapter_bytes(adapter.layout.num_params, adapter.spec.dtype))

    def _page_out(self, names: Iterable[str]) -> None:
        for name in names:
            page = self._pages[name]
            if page.state is PageState.NEW:
                page.state = PageState.UNMADE
            else:
                self._hold(name, self.engine.state(name))
                self.save(name)
            self._forget_resident(name)
        self._trim()

    def _hold(self, name: str, state: AdapterState) -> None:
        page = self._pages[name]
        page.state, page.content = PageState.HELD, state
        self._held.use(name, bytes_of(state))

    def _trim(self) -> None:
        """Let go of held states beyond the limit that are whole on disk."""
        # What is on its way there is waited for: the limit is on memory, and training may be faster
        # than the disk. A state whose write has failed stays, because it is nowhere else.
        for name in self._held.excess():
            page = self._pages[name]
            if page.saved != page.version:
                self._writer.drain()
            if page.saved == page.version:
                page.state, page.content = PageState.ON_DISK, None
                self._held.drop(name)

    def _forget_resident(self, name: str) -> None:
        if name in self.engine.adapters:
            self.engine.unload(name)
        self.adapters.drop(name)

    def _advance(self, name: str, position: int) -> None:
        page = self._pages[name]
        page.position = max(page.position, position)
        page.version += 1
        if page.state is PageState.NEW:
            page.state, page.content = PageState.RESIDENT, None

    def _save_own(self, name: str, state: AdapterState, position: int, version: int) -> None:
        try:
            self._before_save()
            write_state(self.engine, self.state_folder(name), state, position=position)
        except ManyloraError:
            with self._lock:
                page = self._pages.get(name)
                if page is not None and page.asked == version:
                    page.asked = page.saved
            raise
        with self._lock:
            page = self._pages.get(name)
            if page is not None:
                page.saved = version
        self._on_saved(name, position)

    def _page(self, name: str) -> AdapterPage:
        if name not in self._pages:
            raise AdapterNotFound(f"no adapter named {name!r}")
        return self._pages[name]

    def _refuse_known(self, name: str) -> None:
        if name in self._pages:
            raise AdapterExists(f"an adapter named {name!r} exists already; choose another name")


def _snapshot(operation: Any) -> str | None:
    """Return the snapshot that an operation runs with, if it is one."""
    return None if isinstance(operation, OptimStep) else operation.snapshot
