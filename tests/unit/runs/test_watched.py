"""What people see of a run that samples while it goes on: its figures, and what it waits for."""

import io
from typing import Any

import pytest
from rich.console import Console

from manylora.runs.board import MEAN_STEPS, Board, Watched
from manylora.runs.columns import Column
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    EvalDone,
    Phase,
    RunStarted,
    StepDone,
    StepWaits,
    event_dict,
)
from manylora.runs.rl.step_figures import RL_COLUMNS
from manylora.runs.sft import SFT_COLUMNS
from manylora.runs.trackers import scalars
from manylora.runs.view import WAITING_SECONDS, LiveView, PlainView, step_text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, adapter: str = "digits", **changes: Any) -> StepDone:
    figures = {one.name: None for one in RL_COLUMNS.step}
    figures |= {"reward": number / 10, "length": 16.25, "version": number - 1, "tokens": 100}
    return StepDone(adapter, number, 40, figures | changes, 0.5)


def sft_step(number: int) -> StepDone:
    figures = {"loss": 2.0, "lr": 1e-4, "grad_norm": 0.5, "tokens": 100, "trained_tokens": 40}
    return StepDone("letters", number, 40, figures, 0.5)


STARTED = RunStarted(
    "out", "base", {"digits": 40, "letters": 40}, {"digits": RL_COLUMNS, "letters": SFT_COLUMNS}
)


def live() -> LiveView:
    view = LiveView(Console(file=io.StringIO(), width=120, height=20), io.StringIO())
    view(STARTED)
    for name in ("digits", "letters"):
        view(AdapterStarted(name, 0, 40, 64))
    return view


def table(view: LiveView) -> list[list[str]]:
    """The cells of the live table that are not empty, row by row."""
    console = Console(file=io.StringIO(), width=120, height=20)
    view._console = console
    console.print(view._render())
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return [line.split() for line in lines if line.strip()]


def test_the_live_table_has_the_figures_that_are_watched():
    view = live()
    view(sft_step(1))
    view(step(1))
    view(step(2))
    heads = next(row for row in table(view) if row[0] == "adapter")
    wanted = "adapter step reward / loss length version tokens/s eta status"
    assert heads == wanted.split()
    rows = {row[0]: [cell for cell in row if cell.strip("━╸╺")] for row in table(view)}
    # The mean reward of both steps, the last length and version.
    assert rows["digits"][1:5] == ["2/40", "0.15", "16.25", "1"]
    assert rows["letters"][1:5] == ["1/40", "2", "–", "–"]
    view(step(3, kl=0.0123))
    assert "KL" in next(row for row in table(view) if row[0] == "adapter")
    assert "0.0123" in next(row for row in table(view) if row[0] == "digits")


def test_a_mean_is_of_the_last_steps_and_one_without_a_value_is_passed_over():
    mean, last = Watched(Column("a", watched="mean")), Watched(Column("b", watched="last"))
    assert mean.value is None
    for number in range(25):
        mean.add(float(number))
        last.add(float(number))
        last.add(None)
    assert mean.value == pytest.approx(sum(range(25 - MEAN_STEPS, 25)) / MEAN_STEPS)
    assert last.value == 24.0
    # The figure of fine-tuning's curve is its last one, as ever.
    board = Board()
    board(STARTED)
    board(sft_step(1))
    board(StepDone("letters", 2, 40, {**sft_step(2).figures, "loss": 1.0}, 0.5))
    assert step_text(board.row("letters")).startswith("step  2/40  loss 1  200 tokens/s")


def test_plain_lines_have_them_too():
    progress = io.StringIO()
    view = PlainView(progress, io.StringIO(), Clock())
    view(STARTED)
    view(step(1, kl=0.5))
    assert "digits   step  1/40  reward 0.1  length 16.25  KL 0.5  version 0  200 tokens/s" in (
        progress.getvalue()
    )


def test_what_a_step_waits_for_is_seen_until_it_is_done():
    view = live()
    view(step(1))
    view(StepWaits("digits", "samples", 3, 8))

    def status() -> str:
        row = next(row for row in table(view) if row[0] == "digits")
        return " ".join(row[-4:])

    assert status().endswith("waiting for samples 3/8")
    assert "200" in next(row for row in table(view) if row[0] == "digits")  # it still trains
    view(StepWaits("digits", "samples"))
    assert status().endswith("waiting for samples")
    view(step(2))
    assert status().endswith("training")
    view(StepWaits("digits", "samples", 3, 8))
    view(Phase("digits", "evaluating", 1, 4))
    assert status().endswith("evaluating 1/4")
    view(EvalDone("digits", "during", 2, {"reward": 0.5, "samples": 4}))
    assert "samples" not in status()
    view(StepWaits("digits", "samples", 3, 8))
    view(AdapterEnded("digits", "failed", 2, "RolloutFailed: it hung"))
    assert status().endswith("failed")


def test_a_log_file_has_a_line_only_of_a_long_wait():
    clock, progress = Clock(), io.StringIO()
    view = PlainView(progress, io.StringIO(), clock)
    view(STARTED)
    view(step(1))
    for _ in range(100):  # a step every two seconds, each of which waits
        clock.now += 2.0
        view(StepWaits("digits", "samples", 1, 8))
        view(step(2))
    assert "waiting" not in progress.getvalue()
    for _ in range(40):
        clock.now += 2.0
        view(StepWaits("digits", "samples", 7, 8))
    lines = [line for line in progress.getvalue().splitlines() if "waiting" in line]
    assert lines == ["digits   waiting for samples 7/8 …"] * int(80 // WAITING_SECONDS)


def test_the_first_step_has_its_line_although_it_was_waited_for():
    progress = io.StringIO()
    view = PlainView(progress, io.StringIO(), Clock())
    view(STARTED)
    view(StepWaits("digits", "samples", 1, 8))
    view(step(1))
    assert "step  1/40" in progress.getvalue()


def test_machines_are_told_too():
    assert event_dict(StepWaits("digits", "samples", 3, 8)) == {
        "event": "step_waits",
        "adapter": "digits",
        "text": "samples",
        "done": 3,
        "total": 8,
    }


def test_trackers_get_every_figure_that_the_step_has():
    figures = {one.name: 0.25 for one in RL_COLUMNS.step}
    figures |= {"kl": None, "reward/of_a_hook": 0.5, "reward/none": None, "tokens": 100}
    told = scalars(StepDone("digits", 1, 40, figures, 0.5), RL_COLUMNS)
    wanted = {f"train/{one.name}" for one in RL_COLUMNS.step} - {"train/kl"}
    assert set(told) == {*wanted, "train/reward/of_a_hook", "train/tokens_per_second"}
    assert all(isinstance(value, float) for value in told.values())
    evaluation = EvalDone("digits", "during", 10, {"reward": 0.5, "samples": 4})
    assert scalars(evaluation, RL_COLUMNS) == {"eval/reward": 0.5}
    letters = scalars(sft_step(1), SFT_COLUMNS)
    assert "train/trained_tokens" not in letters and "train/loss" in letters
