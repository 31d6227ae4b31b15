"""One adapter's run lives as a client of the host that keeps the worker supplied.

Its course says what a step is (`runs/course.py`). The order of writing makes resuming exact:

1. samples.json (before training), then steps;
2. metrics lines of steps 1 to N are on disk *before* the training state of step N is asked for,
   so a state is never ahead of its metrics; lines that are ahead of the state are cut on resume;
3. the last training state, `final/`, the last evaluation, and only then result.json, whose
   `completed` means that nothing is left to do.
"""

import asyncio
import logging
from asyncio import wrap_future
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from manylora.runs.course import Course, Job, StartedStep, StepFigures
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    EvalDone,
    Listener,
    Phase,
    Status,
    StepDone,
    StepWaits,
    Warned,
)
from manylora.runs.metrics_file import MetricsFile, cut_back, read_metrics
from manylora.runs.outcome import Outcome, error_dict
from manylora.runs.run_folder import AdapterPaths, is_completed, read_json, write_json
from manylora.runs.saved_states import States
from manylora.types import (
    ConfigError,
    DataError,
    EngineLost,
    ManyloraError,
    NotFinite,
    SaveFailed,
    StepRefused,
)

log = logging.getLogger(__name__)

# The summary tells as many; after that they are in the log only.
MOST_WARNINGS = 20

NewestState = Callable[[Path], Path | None]
# Steps that were started and have not been read, each with its number.
Pending = deque[tuple[int, StartedStep]]


class StopAsked(Exception):
    """The run was asked to stop; raised between operations, never across one."""


async def read_data(
    job: Job, client: Any, emit: Listener, check_stop: Callable[[], None]
) -> Course:
    """Read a job's data in a thread and return its course; `check_stop` is called between two
    pieces of the work and raises to end it."""
    emit(Phase(job.name, "reading data", 0, 1))
    loop = asyncio.get_running_loop()

    def tick(text: str, done: int, total: int) -> None:
        check_stop()
        loop.call_soon_threadsafe(emit, Phase(job.name, text, done, total))

    try:
        return await asyncio.to_thread(job.prepare, client, tick)
    except OSError as error:
        raise DataError(f"{error.filename or 'data'}: {error.strerror or error}") from error


class AdapterRun:
    """An `AdapterRun` is one adapter from its first step (or newest checkpoint) to its end."""

    _metrics: MetricsFile

    def __init__(
        self,
        client: Any,
        job: Job,
        paths: AdapterPaths,
        *,
        emit: Listener,
        stop: asyncio.Event,
        preparing: AbstractAsyncContextManager[object],
        newest_state: NewestState,
        patient: bool = False,
    ) -> None:
        """Prepare the run; a `patient` one has no end of its own when the engine is lost."""
        self._client, self._job, self._paths = client, job, paths
        self._emit, self._stop, self._newest_state = emit, stop, newest_state
        self._patient = patient
        # Tokenizers are not made for several threads; one adapter's data at a time.
        self._preparing = preparing
        self._adapter: Any = None
        # Once the adapter is open.
        self._course: Course | None = None
        # Its first step may have begun.
        self._training = False
        self._states = States(job.name, paths, job.keep, job.columns, emit)
        self.outcome = Outcome(job.columns, total_steps=job.steps)

    async def run(self) -> Outcome:
        """Train to the end; never raise: whatever goes wrong is this adapter's outcome. It has no
        status if the engine was lost, and the run is to be made again."""
        if is_completed(self._paths):
            self.outcome = Outcome.earlier(self._paths, self._job.columns)
            self._end("completed")
            return self.outcome
        try:
            await self._train()
            self._end("completed")
        except StopAsked:
            await self._leave()
        except EngineLost as error:
            if not self._patient:
                self._fail(error)
        except Exception as error:
            self._fail(error)
        finally:
            await self._release()
        return self.outcome

    # ------------------------------------------------------------------ from data to `completed`

    async def _train(self) -> None:
        course = await self._prepare()
        self.outcome.total_steps = course.steps
        self.outcome.warnings = list(course.notes)
        for note in course.notes:
            self._emit(Warned(self._job.name, note))
        await self._open(course)
        if self.outcome.steps > course.steps:
            raise ConfigError(
                f"has made {self.outcome.steps:,} steps, and {course.steps:,} are asked for; a "
                "run can be made longer, not shorter"
            )
        self._adapter.text_format = course.text_format
        self._emit(
            AdapterStarted(
                self._job.name, self.outcome.steps, course.steps, self.outcome.num_params
            )
        )
        self._check_stop()
        if self.outcome.steps == 0 and course.evals:
            self.outcome.eval_before = await self._evaluate("before", course)
        with MetricsFile(self._paths.metrics) as self._metrics:
            self._training = True
            await self._steps(course)
        await self._finish(course)

    async def _prepare(self) -> Course:
        async with self._preparing:
            self._check_stop()
            return await read_data(self._job, self._client, self._emit, self._check_stop)

    async def _open(self, course: Course) -> None:
        """Create the adapter, or restore its newest whole training state."""
        job, outcome = self._job, self.outcome
        self._check_stop()
        state = await asyncio.to_thread(self._newest_state, self._paths.checkpoints)
        if state is None:
            self._adapter = await asyncio.to_thread(
                self._client.create, job.name, job.spec, init_from=job.init_from
            )
            saved: dict[str, Any] = {}
        else:
            self._tick(f"restoring {state.name}", 0, 1)
            self._adapter, saved = await asyncio.to_thread(
                self._client.restore, job.name, state, spec=job.spec
            )
        outcome.num_params = self._adapter.num_params
        outcome.resumed_from = self._states.saved_step = int(saved.get("step", 0))
        outcome.eval_before = saved.get("eval_before")
        outcome.evaluations = list(saved.get("evaluations", ()))
        outcome.count_rows(cut_back(self._paths.metrics, outcome.resumed_from))
        outcome.steps = outcome.resumed_from
        # A lost metrics file costs the curve, not its ends.
        outcome.ends |= {name: saved[name] for name in outcome.ends if name in saved}
        self._course = course
        course.watch(self._waits)
        await course.begin(self._adapter, self._paths, outcome.steps, saved.get("course", {}))

    async def _steps(self, course: Course) -> None:
        pending: Pending = deque()
        try:
            for step in range(self.outcome.steps + 1, course.steps + 1):
                if self._stop.is_set():
                    break
                pending.append((step, course.start(self._adapter, step)))
                if len(pending) >= course.ahead:
                    await self._read(pending)
                if self._states.is_written:
                    await self._states.written()
                if _is_due(step, course.eval_every) and step < course.steps:
                    await self._drain(pending)
                    if course.evals:  # a state that is saved of this step knows of it
                        self._note(await self._evaluate("during", course))
                if _is_due(step, self._job.save_every):
                    await self._drain(pending)
                    await self._save(course)
            await self._drain(pending)
            self._check_stop()
        finally:
            for _, started in pending:
                await started.settle()

    async def _drain(self, pending: Pending) -> None:
        while pending:
            await self._read(pending)

    async def _read(self, pending: Pending) -> None:
        """Read the oldest step; it stays in `pending` until nothing of it is in flight."""
        step, started = pending[0]
        try:
            result = await self._result(started)
        except StepRefused as refused:
            raise NotFinite(f"step {step}: {refused}") from refused
        except ManyloraError as error:
            # A new one: the host may have given the same object to several adapters.
            raise type(error)(f"step {step}: {error}") from error
        pending.popleft()
        wrong = self._job.columns.not_finite(result.figures)
        if wrong:
            raise NotFinite(f"step {step}: {wrong}; a smaller lr or a clip_norm may help")
        self._record(step, result)

    async def _result(self, started: StartedStep) -> StepFigures:
        """Wait for a step, or leave it when the run is to stop and it can be left."""
        reading = asyncio.ensure_future(started.read())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and started.give_up():
                raise StopAsked
            return await reading
        finally:
            for waiting in (reading, stopping):
                waiting.cancel()

    def _record(self, step: int, result: StepFigures) -> None:
        done = StepDone(
            adapter=self._job.name,
            step=step,
            steps=self.outcome.total_steps,
            figures=result.figures,
            seconds=round(result.passes.batches + result.update.batches, 4),
            share_seconds=result.passes.share + result.update.share,
        )
        self._metrics.append(done)
        self.outcome.count(done.figures, done.seconds)
        self.outcome.steps = step
        self.outcome.trained_here += done.figures["tokens"]
        self.outcome.training_seconds += done.share_seconds
        self._emit(done)
        for warning in result.warnings:
            self._emit(Warned(self._job.name, f"step {step}: {warning}"))
            if len(self.outcome.warnings) < MOST_WARNINGS:
                self.outcome.warnings.append(f"step {step}: {warning}")

    async def _finish(self, course: Course) -> None:
        """Write the last state, the PEFT folder, the last evaluation, the word `completed`."""
        await self._save(course)
        await self._states.written()
        self._tick("exporting", 0, 1)
        await wrap_future(self._adapter.export(self._paths.final))
        self._check_stop()
        if course.evals:
            self.outcome.eval_after = await self._evaluate("after", course)
            self._note(self.outcome.eval_after)
            await self._states.drop_old(self.outcome.evaluations)
        write_json(self._paths.result, {**self.outcome.to_dict(), "status": "completed"})

    async def _save(self, course: Course) -> None:
        """Ask for a training state of the step that was read last; the next steps go on."""
        told, memory = self.outcome, course.memory()
        saved = {
            "step": told.steps,
            **told.ends,
            "eval_before": told.eval_before,
            "evaluations": told.evaluations,
            **({"course": memory} if memory else {}),
        }
        await course.keep()
        await self._states.save(self._adapter, told.steps, saved, first=self._metrics.sync)

    # ------------------------------------------------------------------ evaluation

    def _note(self, evaluation: dict[str, Any]) -> None:
        entry = {"step": self.outcome.steps, **evaluation}
        self.outcome.evaluations = [*self.outcome.evaluations, entry]

    async def _evaluate(self, when: str, course: Course) -> dict[str, Any]:
        step = self.outcome.steps
        figures, samples = await course.evals.run(self._adapter, self._tick, self.outcome.spend)
        self._write_samples(when, samples)
        self._emit(EvalDone(self._job.name, when, step, figures))
        return figures

    def _write_samples(self, when: str, samples: list[dict[str, Any]]) -> None:
        if not samples or when == "during":
            return
        told = read_json(self._paths.samples) if when == "after" else None
        told = told if isinstance(told, dict) else {}
        write_json(self._paths.samples, {**told, when: samples})

    # ------------------------------------------------------------------ ends

    async def _leave(self) -> None:
        """Save where the adapter is, as asked to stop; what is in flight has been read."""
        try:
            if self._course is not None and self._training:
                await self._save(self._course)
                await self._states.written()
        except Exception as error:
            self._fail(error)
            return
        self._end("cancelled")

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError) and not isinstance(error, ManyloraError):
            where = f" ({error.filename})" if error.filename else ""
            error = SaveFailed(f"{error.strerror or error}{where}")
        elif not isinstance(error, ManyloraError):
            log.error("adapter %s: unexpected error", self._job.name, exc_info=error)
        self.outcome.error = error_dict(error)
        self._end("failed")

    def _end(self, status: Status) -> None:
        self.outcome.status = status
        if self._adapter is None and status != "completed":
            # Ended before it was even opened: tell what an earlier attempt had reached.
            self.outcome.count_rows(read_metrics(self._paths.metrics))
        error = self.outcome.error
        text = f"{error['type']}: {error['message']}" if error else ""
        self._emit(
            AdapterEnded(self._job.name, status, self.outcome.steps, text, self.outcome.skipped)
        )

    async def _release(self) -> None:
        """End the course, and give the adapter's memory back; a state still being written is
        waited for."""
        if self._course is not None:
            try:
                await self._course.end()
            except Exception as error:
                log.debug("adapter %s: %s", self._job.name, error)
        try:
            await self._states.written()
        except Exception as error:
            log.debug("adapter %s: %s", self._job.name, error)
        if self._adapter is not None:
            try:
                await wrap_future(self._adapter.unload())
            except Exception as error:
                log.debug("adapter %s: unload: %s", self._job.name, error)

    def _waits(self, text: str, done: int, total: int) -> None:
        self._emit(StepWaits(self._job.name, text, done, total))

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StopAsked

    def _tick(self, text: str, done: int, total: int) -> None:
        """Tell the progress of anything that is not a step; a long phase can be left here, too."""
        self._check_stop()
        self._emit(Phase(self._job.name, text, done, total))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
