"""A whole run on the fake client: what it writes, how it ends, what a fault costs whom."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from manylora.config import RunFile, SftSettings, load_run_file
from manylora.runs.run_folder import RunPaths
from manylora.types import ConfigError
from tests.unit.runs.driving.conftest import final_weights, metrics, summary, train
from tests.unit.runs.driving.fake_client import FakeClient

NAMES = ("alpha", "beta", "gamma")


def test_a_run_leaves_all_its_files(run_file: RunFile):
    assert train(run_file) == 0
    paths = RunPaths(run_file.out)
    assert load_run_file(paths.run_yaml) == run_file
    for entry in run_file.adapters:
        folder = paths.adapter(entry.name)
        steps = SftSettings.of(entry).max_steps or 0
        rows = metrics(run_file, entry.name)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert set(rows[0]) == {
            "step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "seconds"
        }  # fmt: skip
        kept = {path.name for path in folder.checkpoints.iterdir()}
        assert kept == {f"step-{n}" for n in (*range(4, steps, 4), steps)}
        assert folder.final.is_dir()
        told = summary(run_file)["adapters"][entry.name]
        assert told["status"] == "completed" and told["steps"] == steps and told["error"] is None
        assert told["first_loss"] == rows[0]["loss"] and told["last_loss"] == rows[-1]["loss"]
        assert told["eval_before"]["loss"] != told["eval_after"]["loss"]
        assert told["tokens"] == sum(row["tokens"] for row in rows)
    assert not paths.lock.exists()


def test_rates_are_over_the_time_of_the_device_and_evaluation_is_apart(run_file: RunFile):
    assert train(run_file) == 0
    told, steps = summary(run_file), 0
    for entry in run_file.adapters:
        one, rows = told["adapters"][entry.name], metrics(run_file, entry.name)
        assert {row["seconds"] for row in rows} == {0.22}  # whatever it waited between them
        assert one["seconds"] == pytest.approx(0.22 * len(rows))
        assert one["tokens_per_second"] == pytest.approx(one["tokens"] / one["seconds"], abs=0.1)
        steps += len(rows)
    assert told["training_seconds"] == pytest.approx(0.11 * steps)
    rate = told["tokens"] / told["training_seconds"]
    assert told["tokens_per_second"] == pytest.approx(rate, abs=0.1)
    # Each evaluation is a forward pass over one chunk and one of answers, before and after.
    evaluated = sum(SftSettings.of(entry).eval is not None for entry in run_file.adapters)
    assert told["evaluation_seconds"] == pytest.approx(2 * (0.1 + 0.3) * evaluated)


def test_losses_are_means_over_trained_tokens(run_file: RunFile, client: FakeClient):
    """Repeating a batch's examples does not change its mean, so the fake's part of it stays 1."""
    assert train(run_file, client) == 0
    for row in metrics(run_file, "beta"):
        assert row["trained_tokens"] > 0
        assert row["loss"] >= 1.0  # sum of the weights of a batch = 1 in the fake's loss


def test_operations_of_a_step_are_submitted_together_and_one_step_ahead(
    run_file: RunFile, client: FakeClient
):
    client.step_seconds = 0.01
    assert train(run_file, client) == 0
    mine = [what for name, what in client.submitted if name == "alpha"]
    steps = [w for w in mine if w in ("forward_backward", "optim_step")]
    assert steps == ["forward_backward", "optim_step"] * 6
    save = mine.index("save")
    assert mine[:save].count("optim_step") == 4
    # Adapters take turns; none waits for another to end.
    order = [name for name, what in client.submitted if what == "optim_step"]
    turns = sum(a != b for a, b in itertools.pairwise(order))
    assert turns > 5
    # Nobody reads the log-probabilities of what is not trained.
    assert client.wanted == {("forward_backward", "trained"), ("forward", "trained")}


def test_every_adapter_trains_as_it_does_alone(run_data: dict[str, Any], tmp_path: Path):
    together = RunFile.model_validate(run_data)
    assert train(together) == 0
    for entry in run_data["adapters"]:
        alone = RunFile.model_validate(
            {**run_data, "out": tmp_path / f"alone-{entry['name']}", "adapters": [entry]}
        )
        assert train(alone) == 0
        assert final_weights(alone, entry["name"]) == final_weights(together, entry["name"])


FAULTS = {
    "missing file": ("DataError", "there is no such file"),
    "malformed line": ("DataError", "beta.jsonl:3"),
    "too long": ("DatumTooLong", "beta.jsonl:8"),
    "exploding lr": ("NotFinite", "step 2"),
    "full disk": ("SaveFailed", "No space left"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_one_adapter_only(
    fault: str, run_data: dict[str, Any], run_file: RunFile, client: FakeClient, tmp_path: Path
):
    assert train(run_file) == 0
    well = {name: final_weights(run_file, name) for name in NAMES}
    data = tmp_path / "beta.jsonl"
    if fault == "missing file":
        data.unlink()
    elif fault == "malformed line":
        lines = data.read_text().splitlines()
        data.write_text("\n".join([*lines[:2], "{broken", *lines[3:]]) + "\n")
    elif fault == "too long":
        row = json.dumps({"prompt": "x" * 80, "completion": "y"})
        data.write_text(data.read_text() + row + "\n")
    elif fault == "exploding lr":
        run_data["adapters"][1]["optimizer"]["lr"] = 1e9
    else:
        client.full_disk.add("beta")
    again = RunFile.model_validate({**run_data, "out": tmp_path / "again"})

    assert train(again, client) == 1

    told = summary(again)
    kind, words = FAULTS[fault]
    assert told["status"] == "failed"
    assert told["adapters"]["beta"]["status"] == "failed"
    assert told["adapters"]["beta"]["error"]["type"] == kind
    assert words in told["adapters"]["beta"]["error"]["message"]
    assert not RunPaths(again.out).adapter("beta").final.exists()
    for name in ("alpha", "gamma"):
        assert told["adapters"][name]["status"] == "completed"
        assert final_weights(again, name) == well[name]
    assert all(adapter.unloaded for adapter in client.adapters.values())


def test_a_fault_can_be_mended_and_the_run_taken_up_again(
    run_file: RunFile, tmp_path: Path, client: FakeClient
):
    data = tmp_path / "beta.jsonl"
    good = data.read_text()
    data.write_text("nonsense\n")
    assert train(run_file) == 1
    data.write_text(good)
    assert train(run_file, client) == 0
    assert {name for name, _ in client.submitted} == {"beta"}


def test_evaluation_samples_are_kept_for_before_and_after(run_file: RunFile):
    assert train(run_file) == 0
    samples = json.loads(RunPaths(run_file.out).adapter("beta").samples.read_text())
    assert len(samples["before"]) == len(samples["after"]) == 2
    assert samples["before"][0] == {
        "prompt": "beta0=", "expected": "0", "answer": "ABC", "exact": False
    }  # fmt: skip
    assert samples["after"][0]["answer"] != "ABC"


def test_a_name_of_one_of_the_run_s_own_files_is_refused(run_data: dict[str, Any]):
    run_data["adapters"][0]["name"] = "Summary.json"
    with pytest.raises(ConfigError, match=r"Summary\.json"):
        train(RunFile.model_validate(run_data))


def test_a_missing_tracker_says_what_to_install(run_data: dict[str, Any]):
    run = RunFile.model_validate({**run_data, "wandb": {"project": "p"}})
    with pytest.raises(ConfigError, match=r"manylora\[wandb\]"):
        train(run)


def test_tensorboard_gets_every_step(run_data: dict[str, Any]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFile.model_validate({**run_data, "tensorboard": True})
    assert train(run) == 0
    events = EventAccumulator(str(RunPaths(run.out).adapter("alpha").tensorboard))
    events.Reload()
    logged = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    rows = metrics(run, "alpha")
    assert [step for step, _ in logged] == [row["step"] for row in rows]
    assert logged[-1][1] == pytest.approx(rows[-1]["loss"])
