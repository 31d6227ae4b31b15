"""Which training states stay, and evaluations while a run trains."""

import json
from pathlib import Path
from typing import Any

import pytest

from manylora.config import RunFile
from manylora.runs.run_folder import RunPaths
from manylora.runs.saved_states import best_step, drop_old_states, saved_steps
from manylora.runs.sft import SFT_COLUMNS
from tests.unit.runs.driving.conftest import final_weights, metrics, summary, train
from tests.unit.runs.driving.fake_client import FakeClient


def kept(run: RunFile, name: str) -> list[int]:
    return saved_steps(RunPaths(run.out).adapter(name).checkpoints)


def evaluated(step: int, loss: float | None, exact: float | None = None) -> dict[str, Any]:
    return {"step": step, "loss": loss, "exact_match": exact, "samples": 1}


def test_the_best_has_the_lowest_loss_and_of_equals_the_latest():
    rows = [evaluated(2, 3.0), evaluated(4, 1.0), evaluated(6, 1.0), evaluated(7, 0.5)]
    assert best_step([2, 4, 6], rows, SFT_COLUMNS) == 6
    assert best_step([2, 4, 6, 7], rows, SFT_COLUMNS) == 7
    assert best_step([1, 3], rows, SFT_COLUMNS) is None
    answers = [evaluated(2, None, 0.5), evaluated(4, None, 0.75), evaluated(6, None, 0.25)]
    assert best_step([2, 4, 6], answers, SFT_COLUMNS) == 4
    assert best_step([2, 4], [evaluated(2, None), evaluated(4, 9.0)], SFT_COLUMNS) == 4


@pytest.mark.parametrize(
    ("keep", "left"),
    [(None, [3, 6, 9, 12, 100]), (1, [6, 100]), (2, [6, 12, 100]), (9, [3, 6, 9, 12, 100])],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, keep: int | None, left: list[int]):
    for name in ("step-3", "step-6", "step-9", "step-12", "step-100", "other", "step-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rows = [evaluated(3, 2.0), evaluated(6, 1.0), evaluated(7, 0.0), evaluated(9, 1.5)]
    assert drop_old_states(tmp_path, keep, rows, SFT_COLUMNS) == left == saved_steps(tmp_path)
    assert (tmp_path / "other" / "file").exists() and (tmp_path / "step-x").exists()


def test_a_state_that_cannot_be_deleted_stays_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("manylora.runs.saved_states.shutil.rmtree", refuse)
    drop_old_states(tmp_path, 1, [], SFT_COLUMNS)
    assert saved_steps(tmp_path) == [1, 2]
    assert "Permission denied" in caplog.text


def test_a_run_keeps_what_it_was_told_to(run_data: dict[str, Any]):
    run_data["checkpoints"] = {"keep": 1}
    run_data["adapters"][1]["checkpoints"] = {"keep": 2}
    run_data["adapters"][2]["checkpoints"] = {}  # all
    run = RunFile.model_validate(run_data)
    assert train(run) == 0
    assert {name: kept(run, name) for name in ("alpha", "beta", "gamma")} == {
        "alpha": [6],
        "beta": [8, 11],
        "gamma": [4, 8, 12, 16],
    }


class Worsening(FakeClient):
    """A client whose adapters are best at step 8 on data that are not trained."""

    def create(self, name: str, spec: Any, **settings: Any) -> Any:
        return self._watched(super().create(name, spec, **settings))

    def restore(self, name: str, folder: Path, **settings: Any) -> Any:
        adapter, client = super().restore(name, folder, **settings)
        return self._watched(adapter), client

    def _watched(self, adapter: Any) -> Any:
        forward = adapter.forward

        def worsening(data: Any, *rest: Any, **named: Any) -> Any:
            future = forward(data, *rest, **named)
            result = future.result()
            object.__setattr__(result, "loss", abs(adapter.step - 8) + 1.0)
            return future

        adapter.forward = worsening
        return adapter


def test_the_best_by_evaluation_stays_also_over_a_resume(run_data: dict[str, Any]):
    run_data["adapters"] = run_data["adapters"][2:]
    gamma = run_data["adapters"][0]
    gamma["checkpoints"], gamma["save_every"] = {"keep": 1}, 2
    gamma["sft"]["eval_every"] = 4
    run = RunFile.model_validate(run_data)
    assert train(run, Worsening()) == 0
    assert kept(run, "gamma") == [8, 16]
    told = summary(run)["adapters"]["gamma"]
    assert [one["step"] for one in told["evaluations"]] == [4, 8, 12, 16]
    assert [one["loss"] for one in told["evaluations"]][1] < told["eval_after"]["loss"]

    # Taken up again from its last state, it still knows which was the best.
    paths = RunPaths(run.out).adapter("gamma")
    paths.result.unlink()
    assert train(run, Worsening()) == 0
    assert kept(run, "gamma") == [8, 16]
    assert summary(run)["adapters"]["gamma"]["evaluations"] == told["evaluations"]


def test_evaluations_change_no_weight_and_no_line(run_data: dict[str, Any], tmp_path: Path):
    plain = RunFile.model_validate(run_data)
    assert train(plain) == 0
    for entry in run_data["adapters"]:
        entry["sft"]["eval_every"] = 3
    looking = RunFile.model_validate({**run_data, "out": tmp_path / "looking"})
    assert train(looking) == 0
    for name in ("alpha", "beta", "gamma"):
        assert final_weights(plain, name) == final_weights(looking, name)
        assert [r["loss"] for r in metrics(plain, name)] == [
            r["loss"] for r in metrics(looking, name)
        ]
    samples = json.loads(RunPaths(looking.out).adapter("alpha").samples.read_text())
    assert set(samples) == {"before", "after"}


def test_which_states_stay_may_change_when_a_run_is_taken_up_again(run_data: dict[str, Any]):
    assert train(RunFile.model_validate(run_data)) == 0
    run_data["checkpoints"] = {"keep": 1}
    assert train(RunFile.model_validate(run_data)) == 0


def test_how_many_stay_is_at_least_one():
    with pytest.raises(ValueError, match="keep"):
        RunFile.model_validate({"base": "fake", "out": "o", "checkpoints": {"keep": 0}})
