"""Another kind of run on the same life: its step samples, scores what came, and trains on that.

Guarded: the life takes a course's own figures, order of work, and memory, and knows none by name.
"""

import asyncio
import shutil
from asyncio import wrap_future
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from manylora.config import AdapterEntry, RunFile
from manylora.runs import kinds
from manylora.runs.columns import Column, CourseColumns
from manylora.runs.course import CoursePlan, Progress, StepFigures
from manylora.runs.evaluate import EvalSet
from manylora.runs.kinds import Kind
from manylora.runs.report import report_data
from manylora.runs.run_folder import AdapterPaths, RunPaths
from manylora.types import (
    AdamParams,
    DeviceTime,
    NotFinite,
    SamplingParams,
    TextFormat,
    causal_datum,
)
from tests.unit.runs.driving.conftest import final_weights, metrics, summary, train
from tests.unit.runs.driving.fake_client import FakeClient

STEPS = 6
COLUMNS = CourseColumns(
    step=(
        Column("reward", "reward", better="higher", total="ends", charted=True, checked=True),
        Column("baseline"),
        Column("tokens", total="sum"),
        Column("answers", total="sum", tracked=False),
    ),
)


@dataclass
class Task:
    """A step as a task of the run's loop, as long as it needs to be."""

    task: "asyncio.Task[StepFigures]"

    async def read(self) -> StepFigures:
        return await self.task

    def give_up(self) -> bool:
        return False

    async def settle(self) -> None:
        await asyncio.wait([self.task])


@dataclass
class Rewarded:
    """A step needs the weights that the one before has left, and a mean of earlier rewards."""

    steps: int = STEPS
    ahead: int = 1
    evals: EvalSet = field(default_factory=EvalSet)
    eval_every: int = 0
    text_format: TextFormat = field(default_factory=TextFormat)
    notes: tuple[str, ...] = ()
    baseline: float = 0.0
    tell: Progress = lambda text, done, total: None
    spoiled: int = 0

    def start(self, adapter: Any, step: int) -> Task:
        return Task(asyncio.ensure_future(self._step(adapter, step)))

    async def _step(self, adapter: Any, step: int) -> StepFigures:
        sampled = await wrap_future(adapter.sample([[65, 66]] * 2, SamplingParams(max_tokens=3)))
        rewards = [float(sum(one.tokens)) / 100 + step for one in sampled.sequences]
        data = [causal_datum([65, 66, *one.tokens], [0, 0, 1, 1, 1]) for one in sampled.sequences]
        loss = wrap_future(adapter.forward_backward(data, loss="importance_sampling"))
        update = wrap_future(adapter.optim_step(AdamParams(lr=0.01 * (1 + self.baseline))))
        passed, updated = await loss, await update
        reward = sum(rewards) / len(rewards)
        figures = {"reward": reward, "baseline": self.baseline, "tokens": 8, "answers": 2}
        self.baseline = (self.baseline + reward) / 2
        if step == self.spoiled:
            figures["reward"] = float("nan")
        passes = DeviceTime(
            sampled.device.batches + passed.device.batches,
            sampled.device.share + passed.device.share,
        )
        return StepFigures(figures, passes, updated.device)

    def watch(self, tell: Progress) -> None:
        self.tell = tell

    def memory(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    async def begin(
        self, adapter: Any, paths: AdapterPaths | None, step: int, memory: Mapping[str, Any]
    ) -> None:
        self.baseline = memory.get("baseline", self.baseline)

    async def keep(self) -> None:
        """Nothing stands beside a training state."""

    async def end(self) -> None:
        """Nothing is at work between steps."""


def no_plan(entry: AdapterEntry, tokenizer: Any, vocabulary: Any) -> CoursePlan:
    raise NotImplementedError


@pytest.fixture
def run(run_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> RunFile:
    """Two adapters of the new kind."""
    kind = Kind(lambda entry: COLUMNS, lambda *_: Rewarded(), no_plan)
    monkeypatch.setattr(kinds, "KINDS", {"sft": kind})
    return RunFile.model_validate({**run_data, "adapters": run_data["adapters"][:2]})


def test_its_own_figures_are_logged_summed_and_reported(
    run: RunFile, capsys: pytest.CaptureFixture[str]
):
    assert train(run) == 0
    rows = metrics(run, "alpha")
    assert list(rows[0]) == ["step", "reward", "baseline", "tokens", "answers", "seconds"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["seconds"] == pytest.approx(0.9 + 0.2 + 0.02)
    told = summary(run)["adapters"]["alpha"]
    assert (told["first_reward"], told["last_reward"]) == (rows[0]["reward"], rows[-1]["reward"])
    assert told["tokens"] == 8 * STEPS and told["answers"] == 2 * STEPS
    assert "first_loss" not in told and "trained_tokens" not in told
    columns = {entry.name: COLUMNS for entry in run.adapters}
    assert set(report_data(RunPaths(run.out), columns)["series"]["beta"]) == {"step", "reward"}
    shown = capsys.readouterr()
    assert f"step 6/6  reward {rows[-1]['reward']:.4g}" in shown.err
    assert "reward" in shown.out and "loss" not in shown.out


def test_a_step_waits_for_the_one_before(run: RunFile):
    client = FakeClient()
    assert train(run, client) == 0
    mine = [what for name, what in client.submitted if name == "alpha" and what != "save"]
    assert mine[: 3 * STEPS] == ["sample", "forward_backward", "optim_step"] * STEPS


def test_it_goes_on_exactly_with_what_it_remembers(run: RunFile):
    assert train(run) == 0
    whole, rows = final_weights(run, "beta"), metrics(run, "beta")
    folder = RunPaths(run.out).adapter("beta")
    folder.result.unlink()
    shutil.rmtree(folder.state(STEPS))
    assert train(run) == 0  # from step 4
    assert summary(run)["adapters"]["beta"]["resumed_from"] == 4
    assert (final_weights(run, "beta"), metrics(run, "beta")) == (whole, rows)


def test_a_figure_that_is_not_finite_fails_this_adapter(
    run: RunFile, monkeypatch: pytest.MonkeyPatch
):
    made = iter((Rewarded(spoiled=2), Rewarded()))
    kind = Kind(lambda entry: COLUMNS, lambda *_: next(made), no_plan)
    monkeypatch.setattr(kinds, "KINDS", {"sft": kind})
    assert train(run) == 1
    told = summary(run)["adapters"]
    failed, other = sorted(told.values(), key=lambda entry: entry["steps"])
    assert failed["error"]["type"] == NotFinite.__name__
    assert failed["error"]["message"].startswith("step 2: reward nan")
    assert other["status"] == "completed" and other["steps"] == STEPS
