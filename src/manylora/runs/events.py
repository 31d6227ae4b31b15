"""A run tells its listeners: the live view, the trackers, a program that reads JSON.

Events go one way. A listener never changes a run, and one that raises is not asked again.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from manylora.runs.columns import CourseColumns

Status = Literal["completed", "failed", "cancelled"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run file was accepted.

    Attributes:
        adapters: each adapter's number of steps.
        columns: what the figures of each adapter are; programs are not told.
    """

    out: str
    base: str
    adapters: dict[str, int]
    columns: Mapping[str, CourseColumns] = field(default_factory=dict, metadata={"told": False})


@dataclass(frozen=True, slots=True)
class Phase:
    """Something other than a step is being done that may take seconds.

    Attributes:
        adapter: "" = the whole run's.
        text: "" = it is over.
        done: how far it is.
        total: how far it goes; 0 = not known, and it may well be long.
    """

    adapter: str
    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class AdapterStarted:
    """An adapter takes up training after `step` steps (0 = from the start)."""

    adapter: str
    step: int
    steps: int
    num_params: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step is done; this is also one line of metrics.jsonl.

    Attributes:
        figures: the course's own, in the order of its columns.
        seconds: the device's time in the batches that the step was part of.
        share_seconds: the step's own share of those, by tokens.
    """

    adapter: str
    step: int
    steps: int
    figures: Mapping[str, Any]
    seconds: float
    share_seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """Return the step as a line of metrics.jsonl."""
        return {"step": self.step, **finite(self.figures), "seconds": finite(self.seconds)}

    @classmethod
    def of_row(cls, adapter: str, steps: int, row: Mapping[str, Any]) -> Self:
        """Return the step that a line of metrics.jsonl tells of."""
        figures = {name: value for name, value in row.items() if name not in ("step", "seconds")}
        return cls(adapter, row["step"], steps, figures, row["seconds"])


@dataclass(frozen=True, slots=True)
class StepWaits:
    """A step has begun and waits for something that is in the making; it goes on by itself.

    Attributes:
        text: what it waits for.
        done: how much of that is there.
        total: how much it will be; 0 = not known.
    """

    adapter: str
    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Warned:
    """An adapter's owner should know something; training goes on."""

    adapter: str
    text: str


@dataclass(frozen=True, slots=True)
class EvalDone:
    """The evaluation set was measured, `when` = before, during or after training."""

    adapter: str
    when: str
    step: int
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A training state is on disk and whole."""

    adapter: str
    step: int
    path: str


@dataclass(frozen=True, slots=True)
class AdapterEnded:
    """An adapter has ended; nothing of it follows."""

    adapter: str
    status: Status
    step: int
    error: str = ""
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Stopping:
    """The run was asked to stop; adapters save where they are."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    """All adapters have ended; `summary` is what summary.json says."""

    out: str
    exit_code: int
    summary: dict[str, Any] = field(default_factory=dict)


Event = (
    RunStarted
    | Phase
    | AdapterStarted
    | StepDone
    | StepWaits
    | Warned
    | EvalDone
    | CheckpointSaved
    | AdapterEnded
    | Stopping
    | RunEnded
)
Listener = Callable[[Event], None]


def event_dict(event: Event) -> dict[str, Any]:
    """Return the event as JSON can hold it: `{"event": "step_done", …}`, no NaN."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
    told: dict[str, Any] = {"event": name}
    for one in dataclasses.fields(event):
        value = getattr(event, one.name)
        if one.metadata.get("told", True):
            told |= value if one.name == "figures" else {one.name: value}
    return finite(told)


def finite(value: Any) -> Any:
    """Return the value with every NaN and infinity, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


class Listeners:
    """`Listeners` hand each event to all listeners; one that raises is dropped, the run goes on."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = list(listeners)

    def add(self, listener: Listener) -> None:
        """Listen from now on."""
        self._listeners.append(listener)

    def __call__(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception as error:
                # A closed terminal or a tracker's network must not cost a step.
                self._listeners.remove(listener)
                log.warning("%s failed and is not asked again: %s", _name(listener), error)


def _name(listener: Listener) -> str:
    owner = getattr(listener, "__self__", listener)
    return type(owner).__name__
