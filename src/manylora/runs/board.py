"""The board keeps what the views show from the events: a row per adapter, and the rate of all."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from manylora.runs.columns import Column, CourseColumns
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    EvalDone,
    Event,
    Phase,
    RunStarted,
    Status,
    StepDone,
    StepWaits,
    Stopping,
)

Clock = Callable[[], float]
# Rates and times are of the last seconds: they follow neighbours that come and go.
WINDOW_SECONDS = 10.0
# Steps of which a mean is shown.
MEAN_STEPS = 10


@dataclass(slots=True)
class Rate:
    """A `Rate` is an amount per second over a sliding window."""

    clock: Clock
    marks: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, amount: int, seconds: float = 0.0) -> None:
        """Count what was done just now; if it is the first, `seconds` tells how long it took."""
        now = self.clock()
        if not self.marks and seconds:
            self.marks.append((now - seconds, 0))
        self.marks.append((now, amount))
        while len(self.marks) > 2 and self.marks[0][0] < now - WINDOW_SECONDS:
            self.marks.popleft()

    def per_second(self) -> float | None:
        """Return the rate; None until two marks lie apart."""
        if len(self.marks) < 2:
            return None
        span = self.marks[-1][0] - self.marks[0][0]
        # What the first mark tells of was done before the span began.
        done = sum(amount for _, amount in self.marks) - self.marks[0][1]
        return done / span if span > 0 else None


@dataclass(slots=True)
class Pace:
    """A `Pace` is an amount per second of work over a sliding window, without others' time."""

    clock: Clock
    marks: deque[tuple[float, int, float]] = field(default_factory=deque)

    def add(self, amount: int, seconds: float) -> None:
        """Count an amount that took so many seconds of work, until now."""
        now = self.clock()
        self.marks.append((now, amount, seconds))
        while len(self.marks) > 1 and self.marks[0][0] < now - WINDOW_SECONDS:
            self.marks.popleft()

    def per_second(self) -> float | None:
        """Return the pace; None until something was done that took time."""
        seconds = sum(spent for _, _, spent in self.marks)
        return sum(amount for _, amount, _ in self.marks) / seconds if seconds else None


@dataclass(slots=True)
class Watched:
    """A `Watched` is a figure that people see while the run goes on, as it stands."""

    column: Column
    values: deque[float] = field(default_factory=deque)

    def add(self, value: float | None) -> None:
        """Take in a step's value; None = the step does not have it."""
        if value is not None:
            self.values.append(value)
        if len(self.values) > (MEAN_STEPS if self.column.watched == "mean" else 1):
            self.values.popleft()

    @property
    def value(self) -> float | None:
        """What is shown; None until a step has had it."""
        return statistics.fmean(self.values) if self.values else None


@dataclass(slots=True)
class Row:
    """A `Row` is one adapter as it stands.

    Attributes:
        curve: the figure by which people follow it.
        first: that figure's first value here.
        watched: by their labels, the other figures that people see while it trains.
        waits: what its step waits for; "" = for nothing.
        done: of the phase, or of what it waits for.
    """

    name: str
    tokens: Pace
    steps_done: Rate
    step: int = 0
    steps: int = 0
    curve: Watched | None = None
    first: float | None = None
    watched: dict[str, Watched] = field(default_factory=dict)
    status: str = "waiting"
    phase: str = ""
    waits: str = ""
    done: int = 0
    total: int = 0
    error: str = ""

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self.status in get_args(Status)

    def eta(self) -> float | None:
        """Return the seconds until the last step."""
        rate = self.steps_done.per_second()
        return (self.steps - self.step) / rate if rate and self.steps > self.step else None


class Board:
    """A `Board` holds rows by adapter, which every event updates."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.rows: dict[str, Row] = {}
        self.columns: Mapping[str, CourseColumns] = {}
        self.tokens = Pace(clock)
        self.base = self.out = self.phase = ""
        self.stopping = ""

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.base, self.out, self.columns = event.base, event.out, event.columns
                for name, steps in event.adapters.items():
                    self.row(name).steps = steps
            case Phase(adapter=""):
                self.phase = event.text
            case Phase():
                row = self.row(event.adapter)
                row.status, row.phase, row.waits = "working", event.text, ""
                row.done, row.total = event.done, event.total
            case StepWaits():
                row = self.row(event.adapter)
                row.status, row.phase, row.waits = "training", "", event.text
                row.done, row.total = event.done, event.total
            case AdapterStarted():
                row = self.row(event.adapter)
                row.step, row.steps, row.status, row.phase = event.step, event.steps, "ready", ""
            case StepDone():
                self._step(event)
            case EvalDone():
                self.row(event.adapter).phase = ""
            case AdapterEnded():
                row = self.row(event.adapter)
                row.status, row.error, row.phase = event.status, event.error, ""
                row.step, row.waits = event.step, ""
            case Stopping():
                self.stopping = event.reason

    def row(self, name: str) -> Row:
        """Return the row of an adapter, made on first use."""
        if name not in self.rows:
            row = self.rows[name] = Row(name, Pace(self._clock), Rate(self._clock))
            if name in self.columns:
                columns = self.columns[name]
                row.curve = Watched(columns.curve)
                row.watched = {one.label: Watched(one) for one in columns.watched()}
        return self.rows[name]

    def _step(self, event: StepDone) -> None:
        row = self.row(event.adapter)
        row.step, row.steps = event.step, event.steps
        if row.curve is not None:
            row.curve.add(event.figures[row.curve.column.name])
            row.first = row.curve.value if row.first is None else row.first
        for one in row.watched.values():
            one.add(event.figures.get(one.column.name))
        row.status, row.phase, row.waits = "training", "", ""
        tokens = event.figures["tokens"]
        row.tokens.add(tokens, event.seconds)
        row.steps_done.add(1, event.seconds)
        # Of a run on a server only the first is told.
        self.tokens.add(tokens, event.share_seconds or event.seconds)


def short(value: float | None) -> str:
    """Return a figure for people: four significant digits, or a dash."""
    return "–" if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Return a share between 0 and 1 for people: whole percent, halves rounded up, or a dash.

    The report's own `percent` says the same of the same share.
    """
    # Nine digits first: 57 of 200 is 28.5 %, and 28.499999999999996 in floating point.
    return "–" if share is None else f"{math.floor(round(share * 100, 9) + 0.5)}%"


def shown(column: Column, value: float | None) -> str:
    """Return a figure for people, in its unit."""
    return percent(value) if column.unit == "share" else short(value)


def printable(text: str) -> str:
    """Return the text without characters that would steer a terminal; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def rate(value: float | None) -> str:
    """Return tokens per second for people."""
    return "–" if value is None else f"{value:,.0f}"


def clock_text(seconds: float | None) -> str:
    """Return `1:05`, `2:03:04`, or a dash."""
    if seconds is None:
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
