"""A kind of run brings a course; the life of a run (`runs/adapter_run.py`) asks it for steps.

From an adapter's entry comes a `Job`; reading its data makes of that a `Course`, which starts steps
until there are as many as it has. The life does not know what a step is: a course may train on
data of its own, or sample first, have the answers scored and train on those.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from manylora.checkpoint.peft_config import refuse_lost
from manylora.config import AdapterEntry
from manylora.lora.sites import Site, resolve_targets
from manylora.runs.columns import CourseColumns
from manylora.runs.run_folder import AdapterPaths
from manylora.types import AdapterSpec, Datum, DeviceTime, TextFormat

# Told what is being done and how far it is, (text, done, total); it may raise to end the work.
Progress = Callable[[str, int, int], None]
# What a course's `memory` returned, read back from JSON.
Memory = Mapping[str, Any]
# Told what a part of an evaluation cost, in seconds of the device.
Spend = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class StepFigures:
    """`StepFigures` are what a step that is over has to say.

    Attributes:
        figures: a value for each of the course's step columns.
        passes: the device's time for what costs by tokens: forward, backward, sampling.
        update: the device's time for the optimizer step.
        warnings: what went wrong in it and cost no more than a part of it.
    """

    figures: dict[str, Any]
    passes: DeviceTime
    update: DeviceTime
    warnings: Sequence[str] = ()


class StartedStep(Protocol):
    """A `StartedStep` was started and has not been read."""

    async def read(self) -> StepFigures:
        """Wait for the step; raise what went wrong, without the step's number."""

    def give_up(self) -> bool:
        """Return whether it can be left as if it had never begun, when the run is to stop."""

    async def settle(self) -> None:
        """Wait for whatever of it is still in flight; never raise what went wrong in it."""


class Evaluation(Protocol):
    """An `Evaluation` measures an adapter before, during and after training."""

    def __bool__(self) -> bool:
        """Return whether there is anything to measure."""

    async def run(
        self, adapter: Any, tick: Progress, spend: Spend
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure the adapter as it is now; return figures, and answers for samples.json."""

    async def warm_up(self, adapter: Any, tick: Progress) -> float:
        """Measure very little, so that what only the first evaluation of all takes has been taken;
        return seconds of the device."""

    async def estimate(self, adapter: Any, tick: Progress) -> float:
        """Return the device seconds that a whole evaluation would take, from its first parts."""


class Course(Protocol):
    """A `Course` is one adapter's way through its run, once its data are read.

    Attributes:
        steps: optimizer steps of the whole run.
        ahead: steps that are with the worker before the first of them is read, ≥ 1. With 1, a step
            begins with the weights that the step before has left.
        evals: what the adapter is measured on.
        eval_every: steps between evaluations; 0 = only before and after.
        text_format: how its texts become tokens, to be recorded with the adapter.
        notes: what the adapter's owner should know.
    """

    @property
    def steps(self) -> int: ...
    @property
    def ahead(self) -> int: ...
    @property
    def evals(self) -> Evaluation: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def text_format(self) -> TextFormat: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def watch(self, tell: Progress) -> None:
        """Tell from now on what a step waits for, every few seconds; this `tell` never raises."""

    async def begin(
        self, adapter: Any, paths: AdapterPaths | None, step: int, memory: Memory
    ) -> None:
        """Get ready for the steps that follow; called once the adapter is open.

        Args:
            paths: the adapter's files; None = nothing is to be kept.
            step: the steps that are behind the adapter.
            memory: what `memory` returned for the training state of that step; empty at the start.
        """

    def start(self, adapter: Any, step: int) -> StartedStep:
        """Start a step (1, 2, …) without waiting for it. Called on the run's event loop."""

    def memory(self) -> dict[str, Any]:
        """Return what a training state must hold besides the adapter, as JSON can hold it."""

    async def keep(self) -> None:
        """Write what a training state of now needs beside itself; called before it is asked for."""

    async def end(self) -> None:
        """Let go of whatever is still at work; nothing of the course is asked afterwards."""


@dataclass(frozen=True, slots=True)
class Job:
    """A `Job` is one adapter's run before its data are read.

    Attributes:
        columns: the figures of its steps and evaluations.
        prepare: reads its data with a client and tells its progress; may take long, may raise.
        steps: as far as it is known before the data are read (0 = not yet).
        save_every: steps between training states; 0 = only at the end.
        keep: how many of the newest training states stay; None = all.
        init_from: a PEFT folder to start from.
    """

    name: str
    spec: AdapterSpec
    columns: CourseColumns
    prepare: Callable[[Any, Progress], Course]
    steps: int = 0
    save_every: int = 0
    keep: int | None = None
    init_from: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CoursePlan:
    """A `CoursePlan` says what a course would do; it is found without a base's weights.

    Attributes:
        num_tokens: tokens that go through the base over all steps.
        longest: tokens of the longest example, evaluation included.
        heaviest: the data of the step with the most tokens.
        notes: what is worth knowing of its data.
        details: lines of the plan for people that only this kind of run has.
    """

    num_examples: int
    num_eval_examples: int
    batch_size: int
    steps: int
    num_tokens: int
    longest: int
    heaviest: Sequence[Datum]
    notes: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


def refuse_unwritable(entry: AdapterEntry, sites: Sequence[Site]) -> None:
    """Refuse at the start what could not be written at the end. Raises Unsupported."""
    if any(site.naming == "lost" for site in sites):
        names = [target.site.name for target in resolve_targets(entry.spec(), sites)]
        refuse_lost(names, sites, f"adapter {entry.name!r}")
