"""What a person, a log file and a machine get to see."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
from importlib.resources import files
from typing import Any

import pytest
from rich.console import Console

from manylora.config import RunFile
from manylora.runs.board import Board, Rate, clock_text, percent, short
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    EvalDone,
    Listeners,
    Phase,
    RunEnded,
    RunStarted,
    StepDone,
    Stopping,
    event_dict,
)
from manylora.runs.sft import SFT_COLUMNS
from manylora.runs.summary import print_summary
from manylora.runs.view import LiveView, PlainView
from tests.unit.runs.driving.conftest import summary, train


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, *, steps: int = 1000, loss: float = 2.0, adapter: str = "a") -> StepDone:
    figures = {"loss": loss, "lr": 1e-4, "grad_norm": 0.5, "tokens": 100, "trained_tokens": 40}
    return StepDone(adapter, number, steps, figures, 0.5)


def plain() -> tuple[PlainView, io.StringIO, Clock]:
    clock, progress = Clock(), io.StringIO()
    return PlainView(progress, io.StringIO(), clock), progress, clock


def test_plain_lines_are_few_however_many_steps_there_are():
    view, progress, clock = plain()
    view(RunStarted("out", "base", {"a": 1000}, {"a": SFT_COLUMNS}))
    view(AdapterStarted("a", 0, 1000, 64))
    for number in range(1, 1001):
        clock.now += 0.1  # 100 seconds in all
        view(step(number))
    lines = [line for line in progress.getvalue().splitlines() if "loss" in line]
    assert 15 <= len(lines) <= 25
    assert "step    1/1000" in lines[0] and "step 1000/1000" in lines[-1]
    assert "200 tokens/s" in lines[5]


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
    view(RunStarted("out", "the-base", dict.fromkeys(names, 10), dict.fromkeys(names, SFT_COLUMNS)))
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
    # 100 tokens in half a second of work, however long the others kept it waiting.
    assert row.tokens.per_second() == pytest.approx(200)
    assert row.eta() == pytest.approx(10, rel=0.02)
    assert Rate(clock).per_second() is None


def test_the_rate_of_all_is_over_the_time_in_which_the_device_worked():
    clock = Clock()
    board = Board(clock)
    assert board.tokens.per_second() is None
    for number in range(1, 9):
        clock.now += 3.0  # evaluation and waiting between the steps
        for adapter, share in (("a", 0.1), ("b", 0.3)):
            board(dataclasses.replace(step(number), adapter=adapter, share_seconds=share))
    assert board.tokens.per_second() == pytest.approx(200 / 0.4)


def test_an_error_cannot_steer_the_terminal():
    view, progress, _ = plain()
    view(AdapterEnded("a", "failed", 1, "DataError: \x1b[2Jgone\nsecond line"))
    assert "\x1b" not in progress.getvalue() and "\\x1b[2Jgone\nsecond" in progress.getvalue()


def test_figures_are_short():
    assert [short(v) for v in (None, 0.123456, 12.0)] == ["–", "0.1235", "12"]
    assert [clock_text(v) for v in (None, 5, 65, 3723)] == ["–", "0:05", "1:05", "1:02:03"]


# Halves go up, as people round them; the last ones are halves that floating point misses by a hair.
SHARES = {
    0.0: "0%", 0.004: "0%", 0.005: "1%", 0.125: "13%", 0.375: "38%", 0.495: "50%", 0.625: "63%",
    0.995: "100%", 0.9949: "99%", 1.0: "100%", 1 / 3: "33%", 57 / 200: "29%", 29 / 200: "15%",
}  # fmt: skip


def test_shares_are_rounded_as_people_round():
    assert {share: percent(share) for share in SHARES} == SHARES
    assert percent(None) == "–"
    for number in range(100):  # all the halves that there are
        assert percent((2 * number + 1) / 200) == f"{number + 1}%"


def test_the_plain_line_and_the_closing_table_round_a_share_alike():
    view, progress, _ = plain()
    view(RunStarted("out", "base", {"a": 8}, {"a": SFT_COLUMNS}))
    view(EvalDone("a", "after", 8, {"loss": 1.0, "exact_match": 0.625, "samples": 8}))
    assert "exact match 63% of 8" in progress.getvalue()
    entry = {
        "status": "completed", "steps": 8, "total_steps": 8, "first_loss": 2.0, "last_loss": 1.0,
        "eval_before": {"loss": 2.0, "exact_match": 0.125},
        "eval_after": {"loss": 1.0, "exact_match": 0.625}, "error": None,
    }  # fmt: skip
    summary = {"adapters": {"a": entry}, "tokens": 0}
    out = io.StringIO()
    ended, console = RunEnded("nowhere", 0, summary), Console(file=out, width=120)
    print_summary(ended, console, {"a": SFT_COLUMNS})
    assert "13% → 63%" in out.getvalue()


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's program")
def test_the_report_rounds_a_share_as_the_table_does():
    page = files("manylora.runs").joinpath("report_template.html").read_text(encoding="utf-8")
    (program,) = re.findall(r"^const percent = .*$", page, re.MULTILINE)
    shares = [*SHARES, *((2 * number + 1) / 200 for number in range(100)), None]
    called = f"console.log(JSON.stringify({json.dumps(shares)}.map(percent)))"
    asked = f'const dash = "–";\n{program}\n{called}'
    done = subprocess.run(["node", "-e", asked], capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [percent(share) for share in shares]
