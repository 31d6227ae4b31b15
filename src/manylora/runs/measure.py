"""What a run takes of memory and time, measured: its first steps are made, and nothing is kept."""

import asyncio
import logging
import math
from asyncio import wrap_future
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from manylora.config import RunFile
from manylora.runs.evaluate import FORWARD_CHUNK, SAMPLE_CHUNK, greedy_answers, mean_loss, settle
from manylora.runs.events import Listener, Phase
from manylora.runs.footprint import children_peak_bytes, peak_bytes
from manylora.runs.job import EvalSet, Job, Prepared
from manylora.runs.outcome import error_dict
from manylora.runs.prepare import plan_job
from manylora.runs.sft import InFlight, StopAsked, submit_step
from manylora.runs.stopping import Stopper
from manylora.runs.train import Surroundings, quiet_loading
from manylora.types import DataError, DeviceTime, ManyloraError, NotFinite
from manylora.types.mesh_shape import MeshShape

log = logging.getLogger(__name__)

# The first of them warms up: libraries choose their ways and the allocator grows.
STEPS = 3
# Of an answer that is asked for before evaluations are timed, for the same reason.
WARM_UP_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTimes:
    """What an adapter's run would take, in seconds of the device.

    Attributes:
        steps: that were timed.
        step_seconds: of one of them, in the batches that it was part of.
        share_seconds: its own share of those, by tokens.
        training_seconds, evaluation_seconds: of its whole run, its share.
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
    """What was measured of a run, and what follows for the whole of it.

    Attributes:
        peak: the most memory that this process has taken, in bytes.
        others_peak: the most that another process of the mesh has taken; None = there are none, or
            they are on other machines.
        step_seconds: of a step of all adapters together.
        training_seconds, evaluation_seconds: of the whole run, that the device will work.
    """

    peak: int
    others_peak: int | None
    step_seconds: float
    training_seconds: float
    evaluation_seconds: float
    adapters: dict[str, AdapterTimes]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_run(
    run: RunFile,
    tokens: Mapping[str, int],
    *,
    emit: Listener,
    outside: Surroundings | None = None,
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
        with quiet_loading(), (outside or Surroundings()).open_door(run) as door:
            emit(Phase("", ""))
            if asyncio.run(_all(door, parts, stopper)):
                raise KeyboardInterrupt
            # Before the other processes end.
            peak, others = peak_bytes(), children_peak_bytes()
    mesh = MeshShape.parse(run.mesh)
    times = {part.job.name: part.times() for part in parts}
    # Replicas work at the same time.
    step, training, evaluation = (
        sum(seconds) / mesh.replicas
        for seconds in (
            [one.share_seconds for one in times.values()],
            [one.training_seconds for one in times.values()],
            [one.evaluation_seconds for one in times.values()],
        )
    )
    return Measured(
        peak=peak,
        others_peak=others or None if mesh.size > 1 else None,
        step_seconds=step,
        training_seconds=training,
        evaluation_seconds=evaluation,
        adapters=times,
    )


async def _all(door: Any, parts: Sequence["_Measuring"], stopper: Stopper) -> bool:
    """Take all adapters through each part of a run together, so that their batches merge as they
    will. Returns whether it was stopped."""
    stop = asyncio.Event()
    stopper.heed(asyncio.get_running_loop(), lambda reason: stop.set())
    preparing = asyncio.Lock()

    async def prepare(part: "_Measuring") -> None:
        async with preparing:  # tokenizers are not made for several threads
            await part.prepare(door)

    phases: tuple[Callable[[_Measuring], Awaitable[None]], ...] = (
        prepare,
        lambda part: part.create(door),
        # Before the steps, as in a run: what sampling keeps is there while it trains.
        lambda part: part.warm_up(door),
        lambda part: part.evaluate(door),
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
    """One adapter, from its data to its figures."""

    job: Job
    tokens: int
    emit: Listener
    error: Exception | None = None
    adapter: Any = None
    prepared: Prepared = field(init=False)
    stop: asyncio.Event = field(init=False)
    # Of each step that was made: its tokens, and what its two operations cost.
    made: list[tuple[int, DeviceTime, DeviceTime]] = field(default_factory=list)
    first_seconds: float = 0.0
    loss_seconds: float = 0.0
    answer_seconds: float = 0.0

    async def guarded(
        self, phase: Callable[["_Measuring"], Awaitable[None]], stop: asyncio.Event
    ) -> None:
        """One part of the work, unless an earlier one failed; never raises."""
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

    async def prepare(self, door: Any) -> None:
        """Read its data."""
        loop = asyncio.get_running_loop()

        def tick(text: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(self._tick, text, done, total)
            self._check_stop()

        self._tick("reading data", 0, 1)
        try:
            self.prepared = await asyncio.to_thread(self.job.prepare, door, tick)
        except OSError as error:
            raise DataError(f"{error.filename or 'data'}: {error.strerror or error}") from error

    async def create(self, door: Any) -> None:
        """Make the adapter."""
        job = self.job
        self.adapter = await asyncio.to_thread(
            door.create, job.name, job.spec, init_from=job.init_from
        )
        self.adapter.text_format = self.prepared.text_format

    async def warm_up(self, door: Any) -> None:
        """Evaluate very little: what only the first evaluation of all takes."""
        evals = self.prepared.evals
        few = min(WARM_UP_TOKENS, evals.max_tokens)
        one = replace(evals, data=evals.data[:1], prompts=evals.prompts[:1], max_tokens=few)
        self.first_seconds = sum(await self._evaluate(door, one))

    async def evaluate(self, door: Any) -> None:
        """The first chunk of each kind of an evaluation."""
        evals = self.prepared.evals
        chunk = replace(
            evals, data=evals.data[:FORWARD_CHUNK], prompts=evals.prompts[:SAMPLE_CHUNK]
        )
        self.loss_seconds, self.answer_seconds = await self._evaluate(door, chunk)

    async def _evaluate(self, door: Any, evals: EvalSet) -> tuple[float, float]:
        """Device seconds of the losses and of the answers."""
        loss: list[float] = []
        answers: list[float] = []

        def tick(text: str, done: int, total: int) -> None:
            self._check_stop()
            self._tick(text, done, total)

        if evals.data:
            await mean_loss(self.adapter, evals.data, tick, loss.append)
        if evals.prompts:
            await greedy_answers(self.adapter, door.tokenizer, evals, tick, answers.append)
        return sum(loss), sum(answers)

    async def train(self) -> None:
        """The first steps, two of them in flight, as in a run."""
        pending: deque[InFlight] = deque()
        steps = min(STEPS, self.prepared.steps)
        self._tick("measuring steps", 0, steps)
        try:
            for step in range(1, steps + 1):
                if self.stop.is_set():
                    break
                pending.append(submit_step(self.adapter, self.job, self.prepared, step))
                if len(pending) > 1:
                    await self._read(pending, steps)
            while pending:
                await self._read(pending, steps)
        finally:
            await settle(deque(one for p in pending for one in (p.loss, p.update)))

    async def _read(self, pending: deque[InFlight], steps: int) -> None:
        flight = pending[0]
        result, update = await flight.loss, await flight.update
        pending.popleft()
        if not math.isfinite(result.loss) or not math.isfinite(update.grad_norm):
            raise NotFinite(
                f"step {flight.step}: loss {result.loss}, gradient norm {update.grad_norm}"
            )
        self.made.append((flight.tokens, result.device, update.device))
        self._tick("measuring steps", len(self.made), steps)

    async def unload(self) -> None:
        """Give the adapter's memory back."""
        if self.adapter is not None:
            try:
                await wrap_future(self.adapter.unload())
            except Exception as error:
                self.error = self.error or error

    def times(self) -> AdapterTimes:
        """What follows for the whole run: passes cost by tokens, updates by steps."""
        if self.error is not None:
            return AdapterTimes(error=error_dict(self.error))
        timed = self.made[1:] or self.made
        count, tokens = len(timed), sum(number for number, _, _ in timed)
        passes = sum(passed.share for _, passed, _ in timed)
        updates = sum(update.share for _, _, update in timed)
        return AdapterTimes(
            steps=count,
            step_seconds=sum(a.batches + b.batches for _, a, b in timed) / count,
            share_seconds=(passes + updates) / count,
            training_seconds=passes * self.tokens / tokens + updates * self.prepared.steps / count,
            evaluation_seconds=self.first_seconds
            + self._evaluations() * self._evaluation_seconds(),
        )

    def _evaluations(self) -> int:
        """Before, after, and in between."""
        every = self.job.eval_every
        return 2 + ((self.prepared.steps - 1) // every if every else 0)

    def _evaluation_seconds(self) -> float:
        evals, seconds = self.prepared.evals, 0.0
        if evals.data:
            lengths = [len(datum) for datum in evals.data]
            seconds += self.loss_seconds * sum(lengths) / sum(lengths[:FORWARD_CHUNK])
        if evals.prompts:
            asked = len(evals.prompts)
            seconds += self.answer_seconds * asked / min(asked, SAMPLE_CHUNK)
        return seconds

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise StopAsked

    def _tick(self, text: str, done: int, total: int) -> None:
        self.emit(Phase(self.job.name, text, done, total))
