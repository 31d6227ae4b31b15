"""A run shows itself live on a terminal, as lines elsewhere, as JSON lines to machines.

Progress goes to stderr; what the run has to say in the end goes to stdout.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from manylora.runs.board import Board, Clock, Row, Watched, clock_text, printable, rate, shown
from manylora.runs.columns import Column, CourseColumns
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    EvalDone,
    Event,
    Phase,
    RunEnded,
    RunStarted,
    StepDone,
    StepWaits,
    Stopping,
    Warned,
    event_dict,
)
from manylora.runs.summary import STYLES, print_summary

PLAIN_SECONDS = 5.0
PHASE_SECONDS = 2.0
# A step that waits has a line when nothing was heard of its adapter for so long.
WAITING_SECONDS = 30.0


class View:
    """A `View` is a listener that a person or a machine reads."""

    def __call__(self, event: Event) -> None:
        raise NotImplementedError

    def restore_terminal(self) -> None:
        """Leave the terminal as it was; the process is about to end at once."""


@contextmanager
def open_view(kind: Literal["auto", "plain", "json"]) -> Iterator[View]:
    """Give the view of this kind, for as long as the run lasts."""
    if kind == "json":
        yield JsonView(sys.stdout)
    elif kind == "auto" and sys.stderr.isatty():
        view = LiveView(Console(stderr=True), sys.stdout)
        with view.live:
            yield view
    else:
        yield PlainView(sys.stderr, sys.stdout)


class JsonView(View):
    """A `JsonView` prints one JSON object per line on stdout."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, event: Event) -> None:
        self._out.write(json.dumps(event_dict(event), ensure_ascii=False) + "\n")
        self._out.flush()


class PlainView(View):
    """A `PlainView` prints few lines, fit for a log file: begin, end, and one per five seconds."""

    def __init__(self, progress: TextIO, out: TextIO, clock: Clock = time.monotonic) -> None:
        self._progress, self._out, self._clock = progress, out, clock
        self._board = Board(clock)
        self._shown: dict[str, float] = {}
        self._phases: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        self._board(event)
        match event:
            case RunStarted():
                steps = len(event.adapters)
                self._say("", f"{steps} adapter{'s' * (steps != 1)} on {event.base} → {event.out}")
            case Phase():
                self._phase(event)
            case AdapterStarted():
                after = f", resumed after step {event.step}" if event.step else ""
                self._say(
                    event.adapter,
                    f"{event.num_params:,} parameters, {event.steps:,} steps{after}",
                )
            case StepDone() if self._due(event):
                self._say(event.adapter, step_text(self._board.row(event.adapter)))
            case StepWaits() if self._is_long(event):
                self._say(event.adapter, f"{status_text(self._board.row(event.adapter))} …")
            case Warned():
                self._say(event.adapter, f"warning: {event.text}")
            case EvalDone():
                self._say(event.adapter, eval_text(event, self._board.columns[event.adapter]))
            case AdapterEnded():
                again = " before; nothing to do" if event.skipped else ""
                error = f": {event.error}" if event.error else f" at step {event.step:,}"
                self._say(event.adapter, f"{event.status}{again or error}")
            case Stopping():
                self._say("", f"{event.reason}: saving every adapter; once more to exit at once")
            case RunEnded():
                print_summary(event, summary_console(self._out), self._board.columns)

    def _due(self, event: StepDone) -> bool:
        now = self._clock()
        last = self._shown.get(event.adapter)
        if last is None or event.step == event.steps or now - last >= PLAIN_SECONDS:
            self._shown[event.adapter] = self._shown[f"waiting {event.adapter}"] = now
            return True
        return False

    def _is_long(self, event: StepWaits) -> bool:
        now, key = self._clock(), f"waiting {event.adapter}"
        if now - self._shown.setdefault(key, now) < WAITING_SECONDS:
            return False
        self._shown[key] = now
        return True

    def _phase(self, event: Phase) -> None:
        now = self._clock()
        if self._phases.get(event.adapter) != event.text:
            self._phases[event.adapter] = event.text
            self._shown[f"phase {event.adapter}"] = now
            # Work that counts is usually short; it has a line when it turns out not to be.
            if event.text and not event.total:
                self._say(event.adapter, f"{event.text} …")
        elif now - self._shown[f"phase {event.adapter}"] >= PHASE_SECONDS:
            self._shown[f"phase {event.adapter}"] = now
            self._say(event.adapter, f"{event.text} {event.done:,}/{event.total:,} …")

    def _say(self, adapter: str, text: str) -> None:
        width = max((len(name) for name in self._board.rows), default=0)
        name = f"{adapter:<{width}}  " if adapter else ""
        self._progress.write(f"{name}{printable(text)}\n")
        self._progress.flush()


def summary_console(out: TextIO) -> Console:
    """Return a console as wide as the terminal; in a file, wide enough for long names."""
    return Console(file=out, width=None if out.isatty() else 120)


def step_text(row: Row) -> str:
    """Return a step as one plain line."""
    others = (one for one in row.watched.values() if one.value is not None)
    figures = "".join(
        f"{one.column.label} {shown(one.column, one.value)}  "
        for one in (*([row.curve] if row.curve else ()), *others)
    )
    return (
        f"step {row.step:>{len(str(row.steps))}}/{row.steps}  {figures}"
        f"{rate(row.tokens.per_second())} tokens/s  eta {clock_text(row.eta())}"
    )


def eval_text(event: EvalDone, columns: CourseColumns) -> str:
    """Return an evaluation as one plain line."""
    parts = [f"step {event.step:,}" if event.when == "during" else f"{event.when} training"]
    for column in columns.evaluation:
        value = event.figures[column.name]
        if column.label and value is not None:
            cases = f" of {event.figures[column.counted_by]}" if column.counted_by else ""
            parts.append(f"{column.label} {shown(column, value)}{cases}")
    return "  ".join(parts)


class LiveView(View):
    """A `LiveView` draws a table anew several times a second, by a thread of its own."""

    def __init__(self, console: Console, out: TextIO) -> None:
        self._console, self._out = console, out
        self._board = Board()
        self._spinner = Spinner("dots", style="cyan")
        self.live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )

    def __call__(self, event: Event) -> None:
        self._board(event)
        if isinstance(event, AdapterEnded) and event.error:
            error = printable(event.error)
            self.live.console.print(Text(f"{event.adapter} failed: {error}", style="red"))
        if isinstance(event, Warned):
            note = printable(event.text)
            self.live.console.print(Text(f"{event.adapter}: warning: {note}", style="yellow"))
        if isinstance(event, RunEnded):
            self.live.stop()
            print_summary(event, summary_console(self._out), self._board.columns)

    def restore_terminal(self) -> None:
        """Give the cursor back."""
        self._console.show_cursor(True)

    def _render(self) -> RenderableType:
        board = self._board
        rows = list(board.rows.values())
        room = max(3, self._console.height - 5)
        shown, hidden = self._fitting(rows, room)
        lines: list[RenderableType] = [self._head(rows)]
        if shown:
            lines.append(self._table(shown))
        if hidden:
            lines.append(Text(f"  … and {len(hidden)} more", style="dim"))
        if board.stopping:
            word = "saving every adapter; once more to exit at once"
            lines.append(Text(f"{board.stopping}: {word}", style="yellow"))
        return Group(*lines)

    @staticmethod
    def _fitting(rows: list[Row], room: int) -> tuple[list[Row], list[Row]]:
        if len(rows) <= room:
            return rows, []
        # Those at work first; their order in the file stays.
        chosen = sorted(rows, key=lambda row: (row.ended, row.status == "waiting"))[: room - 1]
        names = {row.name for row in chosen}
        return [r for r in rows if r.name in names], [r for r in rows if r.name not in names]

    def _head(self, rows: list[Row]) -> RenderableType:
        board = self._board
        if board.phase:
            self._spinner.update(text=Text(f" {board.phase} …"))
            return self._spinner
        if not rows:
            return Text(" manylora ", style="bold reverse")
        ended = sum(row.ended for row in rows)
        return Text.assemble(
            (" manylora ", "bold reverse"),
            f"  {board.base}  ",
            (f"{ended}/{len(rows)} done  ", "dim"),
            (f"{rate(board.tokens.per_second())} tokens/s", "bold"),
        )

    @staticmethod
    def _table(rows: list[Row]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=False)
        table.add_column("adapter", no_wrap=True, max_width=28, overflow="ellipsis")
        table.add_column("", width=18)
        curves = " / ".join(dict.fromkeys(row.curve.column.label for row in rows if row.curve))
        # A figure that no step has had yet needs no room.
        watched = dict.fromkeys(
            label for row in rows for label, one in row.watched.items() if one.value is not None
        )
        for name in ("step", curves, *watched, "tokens/s", "eta"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True, max_width=40, overflow="ellipsis")
        for row in rows:
            running = row.status == "training"
            table.add_row(
                row.name,
                ProgressBar(total=max(row.steps, 1), completed=row.step, width=18),
                f"{row.step:,}/{row.steps:,}" if row.steps else "–",
                curve_text(row),
                *(watched_text(row.watched.get(label)) for label in watched),
                rate(row.tokens.per_second()) if running else "–",
                clock_text(row.eta()) if running else "–",
                Text(status_text(row), style=STYLES.get(row.status, "")),
            )
        return table


def curve_text(row: Row) -> Text:
    """Return the figure by which people follow an adapter; green when better than at first."""
    if row.curve is None:
        return Text(watched_text(None))
    badness = row.curve.column.badness
    better = badness(row.curve.value) < badness(row.first)
    return Text(watched_text(row.curve), style="green" if better else "")


def watched_text(one: Watched | None) -> str:
    """Return a figure as it stands; a dash for an adapter that does not have it."""
    return shown(Column(""), None) if one is None else shown(one.column, one.value)


def status_text(row: Row) -> str:
    """Say in few words what the adapter is doing."""
    text = row.phase or (f"waiting for {row.waits}" if row.waits else "")
    if not text:
        return row.status
    return f"{text} {row.done:,}/{row.total:,}" if row.total else text
