"""A run's memory and time are measured: its first steps are made, and nothing is kept."""

import asyncio
import logging
from asyncio import wrap_future
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manylora.config import RunFile
from manylora.runs.adapter_run import Pending, StopAsked, read_data
from manylora.runs.course import Course, Job, StepFigures
from manylora.runs.events import Listener, Phase
from manylora.runs.footprint import children_peak_bytes, peak_bytes
from manylora.runs.kinds import plan_job
from manylora.runs.outcome import error_dict
from manylora.runs.stopping import Stopper
from manylora.runs.train import Dependencies, quiet_loading
from manylora.types import ManyloraError, NotFinite
from manylora.types.mesh_shape import MeshShape

log = logging.getLogger(__name__)

# The first of them warms up: libraries choose their ways and the allocator grows.
STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTimes:
    """`AdapterTimes` are what an adapter's run would take, in seconds of the device.

    Attributes:
        steps: that were timed.
        step_seconds: of one of them, in the batches that it was part of.
        share_seconds: its own share of those, by tokens.
        training_seconds: its share in the steps of its whole run.
        evaluation_seconds: its share in the evaluations of its whole run.
        error: what kept it from being measured; its other figures are 0 then.
    """

    steps: int = 0
    step_seconds: float = 0.0
    share_seconds: float = 0.0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    error: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`Measured` is what was measured of a run, and what follows for the whole of it.

    Attributes:
        peak: the most memory that this process has taken, in bytes.
        others_peak: the most that another process of the mesh has taken; None = there are none, or
            they are on other machines.
        step_seconds: of a step of all adapters together.
        training_seconds: the device's work in all steps of the run.
        evaluation_seconds: the device's work in all its evaluations.
    """

    peak: int
    others_peak: int | None
    step_seconds: float
    training_seconds: float
    evaluation_seconds: float
    adapters: dict[str, AdapterTimes]


def measure_run(
    run: RunFile,
    tokens: Mapping[str, int],
    *,
    emit: Listener,
    outside: Dependencies | None = None,
) -> Measured:
    """Make the first steps of every adapter, and an evaluation's first chunk, as the run would.

    Nothing is written. A fault of one adapter is told in its figures and costs no other.

    Args:
        tokens: of all steps, for each adapter.
        emit: told what is being done.

    Raises:
        BaseModelError: the base cannot be opened.
        KeyboardInterrupt: it was stopped; what was in flight has been waited for.
    """
    jobs = [plan_job(entry) for entry in run.adapters]
    parts = [_Measuring(job, tokens[job.name], emit) for job in jobs]
    with Stopper() as stopper:
        emit(Phase("", f"opening {run.base}"))
        with quiet_loading(), (outside or Dependencies()).open_client(run) as client:
            emit(Phase("", ""))
            if asyncio.run(_all(client, parts, stopper)):
                raise KeyboardInterrupt
            # Before the other processes end.
            peak, others = peak_bytes(), children_peak_bytes()
    mesh = MeshShape.parse(run.mesh)
    times = [part.times() for part in parts]
    # Replicas work at the same time.
    return Measured(
        peak=peak,
        others_peak=others or None if mesh.size > 1 else None,
        step_seconds=sum(one.share_seconds for one in times) / mesh.replicas,
        training_seconds=sum(one.training_seconds for one in times) / mesh.replicas,
        evaluation_seconds=sum(one.evaluation_seconds for one in times) / mesh.replicas,
        adapters={job.name: one for job, one in zip(jobs, times, strict=True)},
    )


async def _all(client: Any, parts: Sequence["_Measuring"], stopper: Stopper) -> bool:
    """Take all adapters through each part of a run together, so that their batches merge as they
    will; return whether it was stopped."""
    stop = asyncio.Event()
    stopper.watch(asyncio.get_running_loop(), lambda reason: stop.set())
    preparing = asyncio.Lock()

    async def prepare(part: "_Measuring") -> None:
        async with preparing:  # tokenizers are not made for several threads
            await part.prepare(client)

    phases: tuple[Callable[[_Measuring], Awaitable[None]], ...] = (
        prepare,
        lambda part: part.create(client),
        # Before the steps, as in a run: what sampling keeps is there while it trains.
        lambda part: part.warm_up(),
        lambda part: part.evaluate(),
        lambda part: part.train(),
    )
    try:
        for phase in phases:
            await asyncio.gather(*(part.guarded(phase, stop) for part in parts))
    finally:
        await asyncio.gather(*(part.unload() for part in parts))
    return stop.is_set()


@dataclass(slots=True)
class _Measuring:
    """A `_Measuring` takes one adapter from its data to its figures."""

    job: Job
    tokens: int
    emit: Listener
    error: Exception | None = None
    adapter: Any = None
    course: Course = field(init=False)
    stop: asyncio.Event = field(init=False)
    # The steps that were made.
    made: list[StepFigures] = field(default_factory=list)
    first_seconds: float = 0.0
    evaluation_seconds: float = 0.0

    async def guarded(
        self, phase: Callable[["_Measuring"], Awaitable[None]], stop: asyncio.Event
    ) -> None:
        """Do one part of the work, unless an earlier one failed; never raise."""
        self.stop = stop
        if self.error is not None or stop.is_set():
            return
        try:
            await phase(self)
        except StopAsked:
            return
        except Exception as error:
            if not isinstance(error, ManyloraError):
                log.error("adapter %s: unexpected error", self.job.name, exc_info=error)
            self.error = error

    async def prepare(self, client: Any) -> None:
        """Read its data."""
        self.course = await read_data(self.job, client, self.emit, self._check_stop)

    async def create(self, client: Any) -> None:
        """Make the adapter."""
        job = self.job
        self.adapter = await asyncio.to_thread(
            client.create, job.name, job.spec, init_from=job.init_from
        )
        self.adapter.text_format = self.course.text_format

    async def warm_up(self) -> None:
        """Evaluate very little."""
        self.first_seconds = await self.course.evals.warm_up(self.adapter, self._tick)

    async def evaluate(self) -> None:
        """Evaluate so much that the time of a whole evaluation follows."""
        self.evaluation_seconds = await self.course.evals.estimate(self.adapter, self._tick)

    async def train(self) -> None:
        """Make the first steps, as many of them in flight as in a run."""
        pending: Pending = deque()
        steps = min(STEPS, self.course.steps)
        self._tick("measuring steps", 0, steps)
        try:
            for step in range(1, steps + 1):
                pending.append((step, self.course.start(self.adapter, step)))
                if len(pending) >= self.course.ahead:
                    await self._read(pending, steps)
            while pending:
                await self._read(pending, steps)
        finally:
            for _, started in pending:
                await started.settle()

    async def _read(self, pending: Pending, steps: int) -> None:
        step, started = pending[0]
        result = await started.read()
        pending.popleft()
        wrong = self.job.columns.not_finite(result.figures)
        if wrong:
            raise NotFinite(f"step {step}: {wrong}")
        self.made.append(result)
        self._tick("measuring steps", len(self.made), steps)

    async def unload(self) -> None:
        """Give the adapter's memory back."""
        if self.adapter is not None:
            try:
                await wrap_future(self.adapter.unload())
            except Exception as error:
                self.error = self.error or error

    def times(self) -> AdapterTimes:
        """Return what follows for the whole run: passes cost by tokens, updates by steps."""
        if self.error is not None:
            return AdapterTimes(error=error_dict(self.error))
        timed = self.made[1:] or self.made
        count, tokens = len(timed), sum(one.figures["tokens"] for one in timed)
        passes = sum(one.passes.share for one in timed)
        updates = sum(one.update.share for one in timed)
        # Before, after, and in between.
        every = self.course.eval_every
        evaluations = 2 + ((self.course.steps - 1) // every if every else 0)
        return AdapterTimes(
            steps=count,
            step_seconds=sum(one.passes.batches + one.update.batches for one in timed) / count,
            share_seconds=(passes + updates) / count,
            training_seconds=passes * self.tokens / tokens + updates * self.course.steps / count,
            evaluation_seconds=self.first_seconds + evaluations * self.evaluation_seconds,
        )

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise StopAsked

    def _tick(self, text: str, done: int, total: int) -> None:
        self._check_stop()
        self.emit(Phase(self.job.name, text, done, total))
