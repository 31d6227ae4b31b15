"""Trackers get every adapter's figures under its own name, and cannot harm a run."""

import shutil
import sys
from types import ModuleType
from typing import Any

import pytest

from manylora.config import RunFile
from manylora.runs.run_folder import RunPaths
from tests.unit.runs.driving.conftest import metrics, train


class Run:
    """What both packages give back from `init`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.rows, self.finished = settings, list[tuple[int, Any]](), 0

    def log(self, figures: dict[str, float], *, step: int) -> None:
        assert not self.finished
        self.rows.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


class Package(ModuleType):
    """A package whose runs can be looked at."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[Run] = []

    def init(self, **settings: Any) -> Run:
        print("welcome, your run lives at …")
        self.runs.append(Run(settings))
        return self.runs[-1]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_adapter_has_a_run_of_its_own(
    name: str,
    run_data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    package = Package(name)
    monkeypatch.setitem(sys.modules, name, package)
    run = RunFile.model_validate({**run_data, name: {"project": "letters"}})
    assert train(run, view="json") == 0
    assert "welcome" not in capsys.readouterr().out  # which is for machines
    assert sorted(one.settings["name"] for one in package.runs) == ["alpha", "beta", "gamma"]
    for one in package.runs:
        adapter = one.settings["name"]
        assert one.settings["project"] == "letters" and one.finished == 1
        assert one.settings["config"]["optimizer"]["lr"] == 1e-2
        logged = [(s, f["train/loss"]) for s, f in one.rows if "train/loss" in f]
        assert logged == [(row["step"], row["loss"]) for row in metrics(run, adapter)]
        assert sum("eval/loss" in figures for _, figures in one.rows) == 2


def test_a_tracker_that_breaks_is_left_behind(
    run_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    package = Package("trackio")

    def no_network(**_: Any) -> Run:
        raise ConnectionError("no network")

    package.init = no_network  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "trackio", package)
    run = RunFile.model_validate({**run_data, "trackio": {"project": "letters"}})
    assert train(run) == 0
    assert caplog.text.count("no network") == 1


def test_tensorboard_forgets_what_is_made_again(run_data: dict[str, Any]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFile.model_validate({**run_data, "tensorboard": True})
    assert train(run) == 0
    folder = RunPaths(run.out).adapter("alpha")
    folder.result.unlink()
    shutil.rmtree(folder.state(6))
    assert train(run) == 0  # from step 4
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
