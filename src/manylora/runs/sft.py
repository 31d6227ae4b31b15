"""The run of one adapter: a client of the door that keeps the worker supplied.

The order of what is written is what makes resuming exact:

1. samples.json (before training), then steps;
2. metrics lines of steps 1 to N are on disk *before* the training state of step N is asked for,
   so a state is never ahead of its metrics; lines that are ahead of the state are cut on resume;
3. the last training state, `final/`, the last evaluation, and only then result.json, whose
   `completed` means that nothing is left to do.
"""

import asyncio
import logging
import math
from asyncio import wrap_future
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manylora.runs.evaluate import GreedyAnswer, evaluate, settle
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    EvalDone,
    Listener,
    Phase,
    Status,
    StepDone,
    Warned,
)
from manylora.runs.job import Job, Prepared, mean_weights
from manylora.runs.metrics_file import MetricsFile, cut_back, read_metrics
from manylora.runs.outcome import Outcome, error_dict
from manylora.runs.run_folder import AdapterPaths, is_completed, read_json, write_json
from manylora.runs.saved_states import States
from manylora.types import (
    ConfigError,
    DataError,
    DeviceTime,
    EngineLost,
    ManyloraError,
    NotFinite,
    SaveFailed,
    StepRefused,
)

log = logging.getLogger(__name__)

NewestState = Callable[[Path], Path | None]


class StopAsked(Exception):
    """The run was asked to stop; raised between operations, never across one."""


@dataclass(slots=True)
class InFlight:
    """A step whose futures have been submitted and not been read."""

    step: int
    lr: float
    tokens: int
    trained_tokens: int
    loss: Awaitable[Any]
    update: Awaitable[Any]


def submit_step(adapter: Any, job: Job, prepared: Prepared, step: int) -> InFlight:
    """Submit both operations of a step before either is awaited."""
    batch, trained = mean_weights(prepared.batch(step))
    adam = prepared.adam(step)
    config = dict(job.loss_config) if job.loss_config else None
    # Of an answer to a long prompt little is trained, and nobody looks at the rest.
    loss = adapter.forward_backward(batch, loss=job.loss, config=config, logprobs="trained")
    update = adapter.optim_step(adam)
    tokens = sum(len(datum) for datum in batch)
    return InFlight(step, adam.lr, tokens, trained, wrap_future(loss), wrap_future(update))


class AdapterRun:
    """One adapter from its first step (or its newest checkpoint) to its end."""

    def __init__(
        self,
        door: Any,
        job: Job,
        paths: AdapterPaths,
        *,
        emit: Listener,
        stop: asyncio.Event,
        preparing: AbstractAsyncContextManager[object],
        newest_state: NewestState,
        patient: bool = False,
    ) -> None:
        """`patient`: have no end of its own when the engine is lost."""
        self._door, self._job, self._paths = door, job, paths
        self._emit, self._stop, self._newest_state = emit, stop, newest_state
        self._patient = patient
        # Tokenizers are not made for several threads; one adapter's data at a time.
        self._preparing = preparing
        self._adapter: Any = None
        self._metrics: MetricsFile | None = None
        self._states = States(job.name, paths, job.keep, emit)
        self.outcome = Outcome(total_steps=job.steps)

    async def run(self) -> Outcome:
        """Train to the end. Never raises: whatever goes wrong is this adapter's outcome. It has no
        status if the engine was lost, and the run is to be made again."""
        if is_completed(self._paths):
            self.outcome = Outcome.earlier(self._paths)
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

    # ------------------------------------------------------------------ the course of a run

    async def _train(self) -> None:
        prepared = await self._prepare()
        self.outcome.total_steps = prepared.steps
        self.outcome.warnings = list(prepared.notes)
        for note in prepared.notes:
            self._emit(Warned(self._job.name, note))
        await self._open()
        if self.outcome.steps > prepared.steps:
            raise ConfigError(
                f"has made {self.outcome.steps:,} steps, and {prepared.steps:,} are asked for; a "
                "run can be made longer, not shorter"
            )
        self._adapter.text_format = prepared.text_format
        self._emit(
            AdapterStarted(
                self._job.name, self.outcome.steps, prepared.steps, self.outcome.num_params
            )
        )
        self._check_stop()
        if self.outcome.steps == 0 and prepared.evals:
            self.outcome.eval_before = await self._evaluate("before", prepared)
        with MetricsFile(self._paths.metrics) as self._metrics:
            await self._steps(prepared)
        await self._finish(prepared)

    async def _prepare(self) -> Prepared:
        async with self._preparing:
            self._check_stop()
            self._tick("reading data", 0, 1)
            loop = asyncio.get_running_loop()

            def tick(text: str, done: int, total: int) -> None:
                self._check_stop()
                loop.call_soon_threadsafe(self._emit, Phase(self._job.name, text, done, total))

            try:
                return await asyncio.to_thread(self._job.prepare, self._door, tick)
            except OSError as error:
                raise DataError(f"{error.filename or 'data'}: {error.strerror or error}") from error

    async def _open(self) -> None:
        """Create the adapter, or restore its newest whole training state."""
        job, outcome = self._job, self.outcome
        self._check_stop()
        state = await asyncio.to_thread(self._newest_state, self._paths.checkpoints)
        if state is None:
            self._adapter = await asyncio.to_thread(
                self._door.create, job.name, job.spec, init_from=job.init_from
            )
            client: dict[str, Any] = {}
        else:
            self._tick(f"restoring {state.name}", 0, 1)
            self._adapter, client = await asyncio.to_thread(
                self._door.restore, job.name, state, spec=job.spec
            )
        outcome.num_params = self._adapter.num_params
        outcome.resumed_from = self._states.saved_step = int(client.get("step", 0))
        outcome.eval_before = client.get("eval_before")
        outcome.evaluations = list(client.get("evaluations", ()))
        outcome.count_rows(cut_back(self._paths.metrics, outcome.resumed_from))
        outcome.steps = outcome.resumed_from
        # A lost metrics file costs the curve, not these two.
        outcome.first_loss = client.get("first_loss", outcome.first_loss)
        outcome.last_loss = client.get("last_loss", outcome.last_loss)

    async def _steps(self, prepared: Prepared) -> None:
        """Keep two steps with the worker, so that it always has work of this adapter to merge."""
        pending: deque[InFlight] = deque()
        try:
            for step in range(self.outcome.steps + 1, prepared.steps + 1):
                if self._stop.is_set():
                    break
                pending.append(submit_step(self._adapter, self._job, prepared, step))
                if len(pending) > 1:
                    await self._read(pending)
                if self._states.is_written:
                    await self._states.written()
                if self._is_due(step, self._job.eval_every) and step < prepared.steps:
                    await self._drain(pending)
                    await self._look(prepared)
                if self._is_due(step, self._job.save_every):
                    await self._drain(pending)
                    await self._save()
            await self._drain(pending)
            self._check_stop()
        finally:
            await settle(deque(f for p in pending for f in (p.loss, p.update)))

    @staticmethod
    def _is_due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    async def _drain(self, pending: deque[InFlight]) -> None:
        while pending:
            await self._read(pending)

    async def _read(self, pending: deque[InFlight]) -> None:
        """Read the oldest step; it stays in `pending` until both of its futures are read."""
        flight = pending[0]
        try:
            result = await flight.loss
            update = await flight.update
        except StepRefused as refused:
            raise NotFinite(f"step {flight.step}: {refused}") from refused
        except ManyloraError as error:
            # A new one: the door may have given the same object to several adapters.
            raise type(error)(f"step {flight.step}: {error}") from error
        pending.popleft()
        if not math.isfinite(result.loss) or not math.isfinite(update.grad_norm):
            raise NotFinite(
                f"step {flight.step}: loss {result.loss}, gradient norm {update.grad_norm}; "
                "a smaller lr or a clip_norm may help"
            )
        cost = (result.device, update.device)
        self._record(flight, result.loss, update.grad_norm, cost)

    def _record(
        self, flight: InFlight, loss: float, grad_norm: float, cost: Sequence[DeviceTime]
    ) -> None:
        done = StepDone(
            adapter=self._job.name,
            step=flight.step,
            steps=self.outcome.total_steps,
            loss=float(loss),
            lr=flight.lr,
            grad_norm=float(grad_norm),
            tokens=flight.tokens,
            trained_tokens=flight.trained_tokens,
            seconds=round(sum(part.batches for part in cost), 4),
            share_seconds=sum(part.share for part in cost),
        )
        assert self._metrics is not None
        self._metrics.append(done)
        self.outcome.count(done.tokens, done.trained_tokens, done.seconds, done.loss)
        self.outcome.steps = flight.step
        self.outcome.trained_here += done.tokens
        self.outcome.training_seconds += done.share_seconds
        self._emit(done)

    async def _finish(self, prepared: Prepared) -> None:
        """The last state, the PEFT folder, the last evaluation, the word `completed`."""
        await self._save()
        await self._states.written()
        self._tick("exporting", 0, 1)
        await wrap_future(self._adapter.export(self._paths.final))
        self._check_stop()
        if prepared.evals:
            self.outcome.eval_after = await self._evaluate("after", prepared)
            self._note(self.outcome.eval_after)
            await self._states.drop_old(self.outcome.evaluations)
        write_json(self._paths.result, {**self.outcome.to_dict(), "status": "completed"})

    # ------------------------------------------------------------------ training states

    async def _save(self) -> None:
        """Ask for a training state of the step that was read last; the next steps go on."""
        assert self._metrics is not None
        told = self.outcome
        client = {
            "step": told.steps,
            "first_loss": told.first_loss,
            "last_loss": told.last_loss,
            "eval_before": told.eval_before,
            "evaluations": told.evaluations,
        }
        await self._states.save(self._adapter, told.steps, client, first=self._metrics.sync)

    # ------------------------------------------------------------------ evaluation

    async def _look(self, prepared: Prepared) -> None:
        """Evaluate between two steps; a state that is saved of this step knows of it."""
        if prepared.evals:
            self._note(await self._evaluate("during", prepared))

    def _note(self, evaluation: dict[str, Any]) -> None:
        entry = {"step": self.outcome.steps, **evaluation}
        self.outcome.evaluations = [*self.outcome.evaluations, entry]

    async def _evaluate(self, when: str, prepared: Prepared) -> dict[str, Any]:
        step = self.outcome.steps
        result, answers = await evaluate(
            self._adapter, self._door.tokenizer, prepared.evals, self._tick, self.outcome.spend
        )
        self._write_samples(when, answers)
        self._emit(
            EvalDone(self._job.name, when, step, result.loss, result.exact_match, result.samples)
        )
        return result.to_dict()

    def _write_samples(self, when: str, answers: list[GreedyAnswer]) -> None:
        if not answers or when == "during":
            return
        samples = read_json(self._paths.samples) if when == "after" else None
        samples = samples if isinstance(samples, dict) else {}
        write_json(self._paths.samples, {**samples, when: [asdict(a) for a in answers]})

    # ------------------------------------------------------------------ ends

    async def _leave(self) -> None:
        """Asked to stop: what is in flight has been read; save where the adapter is."""
        try:
            if self._adapter is not None:
                await self._save()
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
        """Give the adapter's memory back; a state still being written is waited for."""
        try:
            await self._states.written()
        except Exception as error:
            log.debug("adapter %s: %s", self._job.name, error)
        if self._adapter is not None:
            try:
                await wrap_future(self._adapter.unload())
            except Exception as error:
                log.debug("adapter %s: unload: %s", self._job.name, error)

    # ------------------------------------------------------------------ small things

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StopAsked

    def _tick(self, text: str, done: int, total: int) -> None:
        """Progress of anything that is not a step; also where a long phase can be left."""
        self._check_stop()
        self._emit(Phase(self._job.name, text, done, total))
