"""What a person, a log file and a machine get to see."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from manylora.config import RunFile
from manylora.runs.board import Board, Rate, clock_text, short
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    Listeners,
    Phase,
    RunStarted,
    StepDone,
    Stopping,
    event_dict,
)
from manylora.runs.view import LiveView, PlainView
from tests.unit.runs.driving.conftest import summary, train


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, *, steps: int = 1000, loss: float = 2.0, adapter: str = "a") -> StepDone:
    return StepDone(adapter, number, steps, loss, 1e-4, 0.5, 100, 40, 0.5)


def plain() -> tuple[PlainView, io.StringIO, Clock]:
    clock, progress = Clock(), io.StringIO()
    return PlainView(progress, io.StringIO(), clock), progress, clock


def test_plain_lines_are_few_however_many_steps_there_are():
    view, progress, clock = plain()
    view(RunStarted("out", "base", {"a": 1000}))
    view(AdapterStarted("a", 0, 1000, 64))
    for number in range(1, 1001):
        clock.now += 0.1  # 100 seconds in all
        view(step(number))
    lines = [line for line in progress.getvalue().splitlines() if "loss" in line]
    assert 15 <= len(lines) <= 25
    assert "step    1/1000" in lines[0] and "step 1000/1000" in lines[-1]
    assert "1,000 tokens/s" in lines[5]


def test_work_without_an_end_in_sight_is_announced_and_short_work_is_not():
    view, progress, clock = plain()
    view(Phase("", "opening base"))
    view(Phase("a", "sampling", 0, 64))
    view(Phase("a", "sampling", 16, 64))
    assert progress.getvalue() == "opening base …\n"
    clock.now += 3
    view(Phase("a", "sampling", 32, 64))
    assert "sampling 32/64" in progress.getvalue()


def test_json_lines_are_json_and_nothing_else(
    run_file: RunFile, capsys: pytest.CaptureFixture[str]
):
    assert train(run_file, view="json") == 0
    out = capsys.readouterr().out.splitlines()
    events = [json.loads(line) for line in out]
    assert events[0]["event"] != "" and events[-1]["event"] == "run_ended"
    steps = [e for e in events if e["event"] == "step_done"]
    assert len(steps) == 6 + 11 + 16
    assert events[-1]["exit_code"] == 0
    assert events[-1]["summary"] == summary(run_file)


def test_json_has_no_nan():
    assert event_dict(step(1, loss=float("nan")))["loss"] is None


def test_a_failed_adapter_shows_its_error_and_the_table_says_so(
    run_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    run_data["adapters"][1]["sft"]["train"] = "/nowhere/data.jsonl"
    assert train(RunFile.model_validate(run_data)) == 1
    shown = capsys.readouterr()
    assert "failed: DataError: /nowhere/data.jsonl: there is no such file" in shown.err
    assert "beta: DataError: /nowhere/data.jsonl" in shown.out
    assert "completed" in shown.out and "→" in shown.out
    assert "Start the same command again" in shown.out


def test_the_end_names_the_next_command(run_file: RunFile, capsys: pytest.CaptureFixture[str]):
    assert train(run_file) == 0
    out = capsys.readouterr().out
    assert f"manylora sample --adapter {run_file.out}/alpha --prompt alpha0=" in out
    assert str(run_file.out / "report.html") in out


def rendered(view: LiveView) -> str:
    console = Console(file=io.StringIO(), width=110, height=12, force_terminal=True)
    view._console = console
    console.print(view._render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_table_shows_progress_and_fits_the_screen():
    view = LiveView(Console(file=io.StringIO(), width=110, height=12), io.StringIO())
    names = [f"adapter-{i}" for i in range(30)]
    view(RunStarted("out", "the-base", dict.fromkeys(names, 10)))
    view(AdapterStarted("adapter-29", 0, 10, 64))
    view(step(3, steps=10, loss=2.5, adapter="adapter-29"))
    view(AdapterEnded("adapter-0", "failed", 1, "NotFinite: [bold]boom[/bold]"))
    text = rendered(view)
    assert "the-base" in text and "adapter-29" in text and "3/10" in text and "2.5" in text
    assert "more" in text and len(text.splitlines()) <= 12
    view(Stopping("SIGINT"))
    assert "once more to exit at once" in rendered(view)


def test_a_listener_that_fails_is_dropped_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
):
    seen: list[Any] = []

    def broken(_: Any) -> None:
        raise RuntimeError("no network")

    listeners = Listeners([broken, seen.append])
    listeners(step(1))
    listeners(step(2))
    assert len(seen) == 2 and caplog.text.count("no network") == 1


def test_rates_and_remaining_time_follow_the_last_seconds():
    clock = Clock()
    board = Board(clock)
    for number in range(1, 201):
        clock.now += 1.0 if number <= 50 else 0.1
        board(step(number, steps=300))
    row = board.row("a")
    assert row.tokens.per_second() == pytest.approx(1000, rel=0.02)
    assert row.eta() == pytest.approx(10, rel=0.02)
    assert Rate(clock).per_second() is None


def test_an_error_cannot_steer_the_terminal():
    view, progress, _ = plain()
    view(AdapterEnded("a", "failed", 1, "DataError: \x1b[2Jgone\nsecond line"))
    assert "\x1b" not in progress.getvalue() and "\\x1b[2Jgone\nsecond" in progress.getvalue()


def test_figures_are_short():
    assert [short(v) for v in (None, 0.123456, 12.0)] == ["–", "0.1235", "12"]
    assert [clock_text(v) for v in (None, 5, 65, 3723)] == ["–", "0:05", "1:05", "1:02:03"]
