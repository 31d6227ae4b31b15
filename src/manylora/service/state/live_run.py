"""A submitted run that trains has its adapter's run, what it says, and its place on disk."""

import asyncio
import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora.api import AdapterClient
from manylora.checkpoint import newest_state
from manylora.hosting import Host
from manylora.runs.adapter_run import AdapterRun, StopAsked
from manylora.runs.events import AdapterStarted, CheckpointSaved, EvalDone, Event, StepDone
from manylora.runs.kinds import plan_job
from manylora.runs.metrics_file import read_metrics
from manylora.runs.outcome import Outcome
from manylora.runs.run_folder import AdapterPaths
from manylora.service.state.data_preparation import Preparing
from manylora.service.state.run_data import RunData
from manylora.store import RunRow

log = logging.getLogger("manylora.service")

# Steps whose figures are kept at hand; the whole curve is in the run's folder.
MOST_ROWS = 1000

Note = Callable[["LiveRun"], None]


@dataclass(slots=True, eq=False)
class LiveRun:
    """A `LiveRun` is a run that is not over.

    Attributes:
        cancelled: its owner wants it to end.
        rows: figures of its last steps.
        over: its end has been written down, so nothing else may be; guarded by `lock`.
        progress: as last known.
    """

    row: RunRow
    data: RunData
    progress: dict[str, Any]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False
    started: bool = False
    rows: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_ROWS))
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: bool = False

    @property
    def paths(self) -> AdapterPaths:
        return self.data.paths

    async def train(self, host: Host, preparing: Preparing, note: Note) -> Outcome:
        """Train to the end, or to where it was asked to stop. Never raises. `preparing` gives out
        the turns in which data are read and tokenised; `note` is called, in a thread, when
        something is worth being written down."""
        turn = preparing.of(self.row.tenant)

        def between() -> None:
            turn.pass_on()
            if self.stop.is_set():
                raise StopAsked

        job = plan_job(
            self.data.entry, name=self.row.id, between=between,
            read=lambda which: self.data.read(which, between),
        )  # fmt: skip
        client = AdapterClient(host, tenant=self.row.tenant)
        run = AdapterRun(
            client, job, self.paths, emit=self._listener(note), stop=self.stop,
            preparing=turn, newest_state=newest_state,
        )  # fmt: skip
        self._outcome = run.outcome
        return await run.run()

    _outcome: Outcome | None = None

    def figures(self) -> dict[str, Any]:
        """Return how far it is, as `Outcome.to_dict` says it."""
        if self._outcome is not None and self.started:
            self.progress = self._outcome.to_dict()
        return self.progress

    # -- inside ---------------------------------------------------

    def _listener(self, note: Note) -> Callable[[Event], None]:
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:
            match event:
                case StepDone():
                    self.rows.append(event.row())
                    return
                case AdapterStarted():
                    self.started = True
                    self.rows.extend(read_metrics(self.paths.metrics)[-MOST_ROWS:])
                case CheckpointSaved():
                    loop.run_in_executor(None, forget_older, Path(event.path))
                case EvalDone():
                    pass
                case _:
                    return
            loop.run_in_executor(None, note, self)

        return listen


def forget_older(newest: Path) -> None:
    """Delete the training states beside one that is newer and whole."""
    for other in newest.parent.glob("step-*"):
        if other != newest:
            shutil.rmtree(other, ignore_errors=True)


def metrics_after(paths: AdapterPaths, step: int) -> list[dict[str, Any]]:
    """Return the last figures of a run that is over, of the steps after that one."""
    rows = [row for row in read_metrics(paths.metrics) if row["step"] > step]
    return rows[-MOST_ROWS:]
