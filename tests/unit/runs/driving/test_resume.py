"""Interrupted and started again: nothing lost, nothing twice, the same weights to the last bit."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from manylora.config import RunFile
from manylora.runs.events import StepDone
from manylora.runs.metrics_file import MetricsFile, cut_back, read_metrics
from manylora.runs.run_folder import RunPaths, held
from manylora.types import ConfigError
from tests.unit.runs.driving.conftest import final_weights, metrics, summary, train
from tests.unit.runs.driving.fake_client import FakeAdapter, FakeClient

NAMES = ("alpha", "beta", "gamma")
VOLATILE = ("seconds",)


def same_as_undisturbed(run: RunFile, run_data: dict[str, Any], tmp_path: Path) -> None:
    whole = RunFile.model_validate({**run_data, "out": tmp_path / "undisturbed"})
    assert train(whole) == 0
    told, expected = summary(run)["adapters"], summary(whole)["adapters"]
    for name in NAMES:
        assert final_weights(run, name) == final_weights(whole, name)
        rows, wanted = metrics(run, name), metrics(whole, name)
        for row in (*rows, *wanted):
            del row["seconds"]
        assert rows == wanted
        for key in ("eval_before", "eval_after", "first_loss", "last_loss", "tokens", "status"):
            assert told[name][key] == expected[name][key], key


def interrupt_after(seconds: float, number: int) -> threading.Thread:
    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_every_adapter_and_the_run_goes_on_from_there(
    number: int, run_data: dict[str, Any], run_file: RunFile, tmp_path: Path
):
    sender = interrupt_after(0.25, number)
    assert train(run_file, FakeClient(step_seconds=0.02)) == 130
    sender.join()
    told = summary(run_file)
    assert told["status"] == "cancelled"
    reached = {name: told["adapters"][name]["steps"] for name in NAMES}
    assert sum(reached.values()) > 0 and told["adapters"]["gamma"]["status"] == "cancelled"
    assert reached["gamma"] < 16  # the steps that it was to make
    for name, steps in reached.items():
        if steps:
            state = RunPaths(run_file.out).adapter(name).state(steps)
            assert json.loads((state / "state.json").read_text())["step"] == steps

    client = FakeClient()
    assert train(run_file, client) == 0
    for name, steps in reached.items():
        done_again = client.submitted.count((name, "optim_step"))
        assert done_again == len(metrics(run_file, name)) - steps
    same_as_undisturbed(run_file, run_data, tmp_path)


def test_a_run_that_is_stopped_in_its_first_evaluation_is_cancelled(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
):
    forward = FakeAdapter.forward

    def stopping(self: FakeAdapter, *data: Any, **options: Any) -> Any:
        monkeypatch.setattr(FakeAdapter, "forward", forward)
        os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *data, **options)

    monkeypatch.setattr(FakeAdapter, "forward", stopping)
    assert train(run_file) == 130
    told = summary(run_file)["adapters"].values()
    assert {(entry["status"], entry["steps"]) for entry in told} == {("cancelled", 0)}
    assert all(entry["error"] is None for entry in told)


def test_signal_handlers_are_put_back(run_file: RunFile):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train(run_file) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it but what unwinds the test."""


def test_a_run_that_dies_anywhere_goes_on_from_its_newest_state(
    run_data: dict[str, Any], run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    append = MetricsFile.append
    left = 0  # lines until the death; afterwards nothing is written any more

    def dying(self: MetricsFile, step: StepDone) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        append(self, step)

    monkeypatch.setattr(MetricsFile, "append", dying)
    for left in (5, 9, 2, 13):  # noqa: B007 - read by `dying`
        with pytest.raises(Killed):
            train(run_file)
    left = 1000
    assert train(run_file) == 0
    same_as_undisturbed(run_file, run_data, tmp_path)


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    run_data: dict[str, Any], run_file: RunFile, tmp_path: Path
):
    assert train(run_file) == 0
    folder = RunPaths(run_file.out).adapter("gamma")
    folder.result.unlink()
    (folder.state(16) / "state.json").write_text("{torn")
    assert train(run_file) == 0
    assert summary(run_file)["adapters"]["gamma"]["resumed_from"] == 12
    same_as_undisturbed(run_file, run_data, tmp_path)


def test_a_finished_run_is_not_trained_again(run_file: RunFile):
    assert train(run_file) == 0
    before = summary(run_file)
    client = FakeClient()
    assert train(run_file, client) == 0
    assert client.submitted == []
    assert summary(run_file) == before


def test_another_run_s_folder_is_refused_and_the_difference_named(
    run_data: dict[str, Any], run_file: RunFile
):
    assert train(run_file) == 0
    run_data["adapters"][1]["optimizer"]["lr"] = 5e-2
    with pytest.raises(ConfigError, match=r"adapters\.beta\.optimizer\.lr: 0\.01 there, 0\.05"):
        train(RunFile.model_validate(run_data))


def test_settings_that_change_no_weight_may_change(run_data: dict[str, Any], run_file: RunFile):
    assert train(run_file) == 0
    run_data["report"] = False
    run_data["adapters"].reverse()
    assert train(RunFile.model_validate(run_data)) == 0


def test_changed_data_are_refused(run_file: RunFile, tmp_path: Path):
    assert train(run_file) == 0
    data = tmp_path / "alpha.jsonl"
    data.write_text(data.read_text() + '{"prompt": "new", "completion": "line"}\n')
    with pytest.raises(ConfigError, match=r"alpha.*alpha\.jsonl has changed"):
        train(run_file)


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(
    run_data: dict[str, Any], run_file: RunFile
):
    assert train(run_file) == 0
    mine = run_file.out / "notes.txt"
    also_mine = run_file.out / "alpha" / "notes.txt"
    mine.write_text("keep"), also_mine.write_text("keep")
    other = RunFile.model_validate({**run_data, "adapters": run_data["adapters"][1:]})
    assert train(other, overwrite=True) == 0
    assert mine.read_text() == also_mine.read_text() == "keep"
    assert [path.name for path in (run_file.out / "alpha").iterdir()] == ["notes.txt"]
    assert set(summary(other)["adapters"]) == {"beta", "gamma"}


def test_a_folder_that_is_no_run_is_refused_even_with_overwrite(run_file: RunFile):
    precious = run_file.out / "alpha" / "final"
    precious.mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds no run"):
            train(run_file, overwrite=overwrite)
    assert precious.is_dir()


def test_two_processes_cannot_train_into_one_folder(run_file: RunFile):
    with (
        held(RunPaths(run_file.out)),
        pytest.raises(ConfigError, match="another process"),
    ):
        train(run_file)


def test_metrics_are_cut_back_to_the_state(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in range(1, 6):
            figures = {"loss": float("nan"), "lr": 0.1, "grad_norm": 1.0}
            figures |= {"tokens": 8, "trained_tokens": 4}
            file.append(StepDone("a", step, 9, figures, 0.1))
    assert read_metrics(path)[0]["loss"] is None
    with path.open("a") as torn:
        torn.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in cut_back(path, 3)] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3
    assert cut_back(path, 0) == [] and path.read_text() == ""
    assert cut_back(tmp_path / "none", 4) == []


def test_an_attempt_that_fails_early_does_not_forget_what_was_reached(
    run_file: RunFile, tmp_path: Path
):
    assert train(run_file) == 0
    RunPaths(run_file.out).adapter("beta").result.unlink()
    (tmp_path / "beta.jsonl").unlink()
    before = summary(run_file)["adapters"]["beta"]
    assert train(run_file) == 1
    told = summary(run_file)["adapters"]["beta"]
    assert told["status"] == "failed"
    assert (told["steps"], told["tokens"]) == (before["steps"], before["tokens"])


def test_interrupted_while_the_base_opens_is_told_without_forgetting_what_is_done(
    run_file: RunFile,
):
    assert train(run_file) == 0
    RunPaths(run_file.out).adapter("gamma").result.unlink()

    class Slow(FakeClient):
        def __enter__(self) -> FakeClient:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            raise AssertionError("was not interrupted")

    assert train(run_file, Slow()) == 130
    told = summary(run_file)["adapters"]
    assert (told["alpha"]["status"], told["alpha"]["steps"]) == ("completed", 6)
    assert (told["gamma"]["status"], told["gamma"]["steps"]) == ("cancelled", 16)
    assert train(run_file) == 0


@pytest.mark.parametrize("key", ["max_steps", "epochs"])
def test_a_finished_run_made_longer_is_the_run_that_was_so_long_from_the_start(
    key: str, run_data: dict[str, Any], tmp_path: Path
):
    for entry in run_data["adapters"]:
        entry["optimizer"].update(schedule="constant", warmup_steps=3)
        del entry["sft"]["max_steps"]
        entry["sft"][key] = 3
    short = RunFile.model_validate(run_data)
    assert train(short) == 0
    finished = final_weights(short, "beta")
    for entry in run_data["adapters"][1:]:
        entry["sft"][key] = 5
    longer, client = RunFile.model_validate(run_data), FakeClient()
    assert train(longer, client) == 0
    assert "alpha" not in client.adapters  # it is as long as it was, and is left as it is
    assert final_weights(longer, "beta") != finished
    assert summary(longer)["adapters"]["beta"]["steps"] == 5 * (4 if key == "epochs" else 1)
    same_as_undisturbed(longer, run_data, tmp_path)
    assert train(longer, FakeClient()) == 0


def test_a_schedule_that_depends_on_the_end_cannot_be_made_longer(
    run_data: dict[str, Any], run_file: RunFile
):
    assert train(run_file) == 0
    before = summary(run_file)
    run_data["adapters"][0]["sft"]["max_steps"] = 50
    with pytest.raises(
        ConfigError,
        match=r"adapters\.alpha\.sft\.max_steps: max_steps 6 there, 50 here; its schedule is linear"
        r".*6 that it has made.*schedule: constant.*init_from: .*alpha/final",
    ):
        train(RunFile.model_validate(run_data))
    assert train(run_file, FakeClient()) == 0 and summary(run_file) == before
    # While only the warm-up is behind it, its learning rates are those of the longer run.
    warm = {**run_data, "out": run_data["out"] / "warm"}
    for entry in warm["adapters"]:
        entry["optimizer"]["warmup_steps"] = 20
        entry["sft"]["max_steps"] = 6
    assert train(RunFile.model_validate(warm)) == 0
    warm["adapters"][0]["sft"]["max_steps"] = 50
    assert train(RunFile.model_validate(warm)) == 0


def test_a_run_cannot_be_made_shorter_or_go_on_without_its_states(
    run_data: dict[str, Any], run_file: RunFile
):
    for entry in run_data["adapters"]:
        entry["optimizer"]["schedule"] = "constant"
    run = RunFile.model_validate(run_data)
    assert train(run) == 0
    run_data["adapters"][0]["sft"]["max_steps"] = 5
    with pytest.raises(ConfigError, match="6 there, 5 here; a run can be made longer, not shorter"):
        train(RunFile.model_validate(run_data))
    del run_data["adapters"][0]["sft"]["max_steps"]
    run_data["adapters"][0]["sft"]["epochs"] = 1
    assert train(RunFile.model_validate(run_data)) == 1
    error = summary(run)["adapters"]["alpha"]["error"]
    assert (
        error["type"] == "ConfigError" and "has made 6 steps, and 4 are asked" in error["message"]
    )
    run_data["adapters"][0]["sft"]["epochs"] = 3
    assert train(RunFile.model_validate(run_data)) == 0
    shutil.rmtree(RunPaths(run.out).adapter("alpha").checkpoints)
    run_data["adapters"][0]["sft"]["epochs"] = 4
    with pytest.raises(ConfigError, match="its training states are gone"):
        train(RunFile.model_validate(run_data))
