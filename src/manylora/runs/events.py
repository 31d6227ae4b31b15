"""What a run tells whoever is looking: the live view, the trackers, a machine.

Events go one way. A listener never changes a run, and one that raises is not asked again.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["completed", "failed", "cancelled"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run file was accepted; `adapters` maps each name to its number of steps."""

    out: str
    base: str
    adapters: dict[str, int]


@dataclass(frozen=True, slots=True)
class Phase:
    """Something other than a step that may take seconds.

    Attributes:
        adapter: "" = the whole run's.
        text: "" = it is over.
        done, total: how far it is; total 0 = not known, and it may well be long.
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
    """One optimizer step; also one line of metrics.jsonl.

    Attributes:
        loss: mean over the trained tokens of the batch.
        grad_norm: L2 norm before clipping.
        tokens: positions that the model read; trained_tokens: those with a weight.
        seconds: of the device, in the batches that the step was part of.
        share_seconds: the step's own share of those, by tokens.
    """

    adapter: str
    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    share_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that an adapter's owner should know; training goes on."""

    adapter: str
    text: str


@dataclass(frozen=True, slots=True)
class EvalDone:
    """Figures on the evaluation set, `when` = before, during or after training."""

    adapter: str
    when: str
    step: int
    loss: float | None
    exact_match: float | None
    samples: int


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
    | Warned
    | EvalDone
    | CheckpointSaved
    | AdapterEnded
    | Stopping
    | RunEnded
)
Listener = Callable[[Event], None]


def event_dict(event: Event) -> dict[str, Any]:
    """The event as JSON can hold it: `{"event": "step_done", …}`, no NaN."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
    return {"event": name, **finite(dataclasses.asdict(event))}


def finite(value: Any) -> Any:
    """The value with every NaN and infinity, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


class Listeners:
    """Hands each event to every listener; one that raises is dropped, and the run goes on."""

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
                # A closed terminal or a tracker's network must not cost anybody a step.
                self._listeners.remove(listener)
                log.warning("%s failed and is not asked again: %s", _name(listener), error)


def _name(listener: Listener) -> str:
    owner = getattr(listener, "__self__", listener)
    return type(owner).__name__
