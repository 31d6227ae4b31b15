"""A run claims its folder, opens the base, runs every adapter of its file, and reports."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from manylora.checkpoint import newest_state
from manylora.config import RunFile
from manylora.runs.adapter_run import AdapterRun, NewestState
from manylora.runs.columns import CourseColumns
from manylora.runs.course import Job
from manylora.runs.events import Listeners, Phase, RunEnded, RunStarted, Stopping
from manylora.runs.hardware import hardware, versions
from manylora.runs.kinds import plan_job
from manylora.runs.outcome import Outcome, exit_code
from manylora.runs.report import write_report
from manylora.runs.resume import claim
from manylora.runs.run_folder import RunPaths, held, is_completed, read_json, write_json
from manylora.runs.stopping import EXIT_INTERRUPTED, Stopper
from manylora.runs.trackers import open_trackers
from manylora.runs.view import open_view
from manylora.types import ConfigError, SaveFailed
from manylora.types.mesh_shape import MeshShape

ViewKind = Literal["auto", "plain", "json"]
OpenClient = Callable[[RunFile], AbstractContextManager[Any]]

# Engines that may be lost in a row without a step between them.
MOST_LOSSES = 3

log = logging.getLogger(__name__)


def open_trainer(run: RunFile) -> AbstractContextManager[Any]:
    """Open a trainer on the run file's base."""
    from manylora.api import Trainer
    from manylora.processes.external_start import Meeting, started_by_others

    started = started_by_others()
    if started is not None and run.ray is not None:
        raise ConfigError(
            f"ray is {run.ray!r}, and {started.world_size} processes were started already: Ray "
            "starts its own; run `manylora train` once, or leave `ray` out"
        )
    return Trainer(
        run.opening(),
        step_seconds=run.step_seconds,
        ray=run.ray,
        engine_address=run.engine_address,
        meeting=None if started is None else Meeting(started, run.out),
    )


@dataclass(frozen=True, slots=True)
class Dependencies:
    """`Dependencies` are what a run takes from other rooms; tests put small ones in their place."""

    open_client: OpenClient = open_trainer
    newest_state: NewestState = newest_state


def train_run_file(
    run: RunFile,
    *,
    overwrite: bool = False,
    view: ViewKind = "auto",
    outside: Dependencies | None = None,
) -> int:
    """Train every adapter of a run file, or go on where an earlier attempt was interrupted.

    Args:
        overwrite: start afresh; delete what an earlier run wrote to the same folder.
        view: how progress is shown; auto = live on a terminal, plain lines elsewhere.

    Returns:
        The exit code: 0 when all adapters are completed, 1 when one failed, 130 when the run was
        interrupted.

    Raises:
        ConfigError: the folder holds another run, or a tracker's package is missing.
        BaseModelError: the base cannot be opened.
    """
    return _Run(run, overwrite, view, outside or Dependencies()).go()


@dataclass(slots=True)
class _Run:
    """A `_Run` is one call of `train_run_file`."""

    run: RunFile
    overwrite: bool
    view_kind: ViewKind
    outside: Dependencies
    paths: RunPaths = field(init=False)
    emit: Listeners = field(default_factory=Listeners)
    jobs: list[Job] = field(init=False)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    # Of the training itself: without opening the base, with evaluations.
    seconds: float = 0.0
    nothing_to_do: bool = False

    def __post_init__(self) -> None:
        self.paths = RunPaths(self.run.out)
        self.jobs = [plan_job(entry, keep=self.run.checkpoints.keep) for entry in self.run.adapters]
        self.outcomes = {job.name: Outcome(job.columns, total_steps=job.steps) for job in self.jobs}

    def go(self) -> int:
        with ExitStack() as stack:
            stack.enter_context(held(self.paths))
            view = stack.enter_context(open_view(self.view_kind))
            self.emit.add(view)
            stopper = stack.enter_context(Stopper(restore_terminal=view.restore_terminal))
            try:
                self._begin(stack)
            except KeyboardInterrupt:
                return EXIT_INTERRUPTED  # the folder may be another run's; nothing is written
            try:
                self._train(stopper)
            except KeyboardInterrupt:
                self._cancel_all()
            return self._end()

    def _begin(self, stack: ExitStack) -> None:
        def hashing(source: str) -> None:
            self.emit(Phase("", f"checking {Path(source).name}"))

        try:
            claim(self.run, self.paths, overwrite=self.overwrite, hashing=hashing)
        except OSError as error:
            raise SaveFailed(f"{self.paths.root}: {error.strerror or error}") from error
        for tracker in open_trackers(self.run, self.paths):
            self.emit.add(tracker)
            stack.callback(tracker.close)
        steps = {job.name: job.steps for job in self.jobs}
        self.emit(RunStarted(str(self.paths.root), self.run.base, steps, self._columns()))

    def _columns(self) -> dict[str, CourseColumns]:
        return {job.name: job.columns for job in self.jobs}

    def _train(self, stopper: Stopper) -> None:
        self.nothing_to_do = all(is_completed(self.paths.adapter(j.name)) for j in self.jobs)
        if self.nothing_to_do:
            asyncio.run(self._all(None, stopper))  # each says that it is; no base is needed
            return
        self.emit(Phase("", f"opening {self.run.base}"))
        with quiet_loading(), self.outside.open_client(self.run) as client:
            self.emit(Phase("", ""))
            begun = time.perf_counter()
            try:
                self._train_on(client, stopper)
            finally:
                self.seconds = time.perf_counter() - begun

    def _train_on(self, client: Any, stopper: Stopper) -> None:
        """Train to the end; when the engine is lost, go on from the newest states with another."""
        losses, reached = 0, -1
        while True:
            asyncio.run(self._all(client, stopper, patient=losses < MOST_LOSSES))
            if all(outcome.status for outcome in self.outcomes.values()):
                return
            steps = sum(outcome.steps for outcome in self.outcomes.values())
            losses, reached = (losses + 1 if steps <= reached else 1), max(steps, reached)
            log.error("the engine was lost; going on from the newest training states")
            self.emit(Phase("", f"opening {self.run.base} again"))
            client.reopen()
            self.emit(Phase("", ""))

    async def _all(self, client: Any, stopper: Stopper, *, patient: bool = False) -> None:
        """Run one task per adapter; none of them raises."""
        stop, preparing = asyncio.Event(), asyncio.Lock()

        def ask(reason: str) -> None:
            stop.set()
            self.emit(Stopping(reason))

        stopper.watch(asyncio.get_running_loop(), ask)
        runs = {
            job.name: AdapterRun(
                client,
                job,
                self.paths.adapter(job.name),
                emit=self.emit,
                stop=stop,
                preparing=preparing,
                newest_state=self.outside.newest_state,
                patient=patient,
            )
            for job in self.jobs
        }
        self.outcomes = {name: run.outcome for name, run in runs.items()}
        await asyncio.gather(*(self._one(name, run) for name, run in runs.items()))

    async def _one(self, name: str, run: AdapterRun) -> None:
        self.outcomes[name] = await run.run()
        # After each adapter, so that a killed run has told what it knew.
        self._write_summary()

    def _cancel_all(self) -> None:
        """Call all adapters cancelled: the run was interrupted before any of them was opened."""
        for job in self.jobs:
            outcome = Outcome.earlier(self.paths.adapter(job.name), job.columns)
            outcome.total_steps = outcome.total_steps or job.steps
            outcome.status = outcome.status or "cancelled"
            self.outcomes[job.name] = outcome

    def _end(self) -> int:
        summary = self._write_summary()
        if self.run.report:
            self.emit(Phase("", "writing report.html", 0, 1))
            try:
                write_report(self.paths, self._columns())
            except OSError as error:
                log.error("report.html: %s", error)
        code = exit_code([outcome.status for outcome in self.outcomes.values()])
        self.emit(RunEnded(str(self.paths.root), code, summary))
        return code

    def _write_summary(self) -> dict[str, Any]:
        summary = self._summary()
        told = read_json(self.paths.summary) if self.nothing_to_do else None
        if isinstance(told, dict) and told.get("status") == "completed":
            return told  # what the run itself said stays, if it came to say it
        try:
            write_json(self.paths.summary, summary)
        except OSError as error:  # a full disk must not cost the adapters that still train
            log.error("summary.json: %s", error)
        return summary

    def _summary(self) -> dict[str, Any]:
        outcomes = self.outcomes.values()
        tokens = sum(outcome.trained_here for outcome in outcomes)
        # Replicas work at the same time.
        side_by_side = MeshShape.parse(self.run.mesh).replicas
        training = sum(outcome.training_seconds for outcome in outcomes) / side_by_side
        evaluation = sum(outcome.evaluation_seconds for outcome in outcomes) / side_by_side
        return {
            "status": _overall([outcome.status for outcome in outcomes]),
            "base": self.run.base,
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "training_seconds": round(training, 3),
            "evaluation_seconds": round(evaluation, 3),
            "tokens": tokens,
            "tokens_per_second": round(tokens / training, 1) if training else None,
            "versions": versions(),
            "hardware": hardware(),
            "adapters": {
                name: {**outcome.to_dict(), "status": outcome.status or "running"}
                for name, outcome in self.outcomes.items()
            },
        }


def _overall(statuses: Sequence[str | None]) -> str:
    for status in (None, "cancelled", "failed"):
        if status in statuses:
            return status or "running"
    return "completed"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep other libraries' progress bars out of ours."""
    from transformers.utils import logging as hub_logging

    shown = hub_logging.is_progress_bar_enabled()
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hub_logging.enable_progress_bar()
