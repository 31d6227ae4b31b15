"""The first steps of a run, made and not kept: what is asked of the client, and what follows."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from manylora.cli.main import main
from manylora.config import RunFile
from manylora.runs.events import Event, Phase
from manylora.runs.measure import STEPS, Measured, measure_run
from manylora.runs.train import Dependencies
from tests.unit.runs.driving.conftest import write_lines
from tests.unit.runs.driving.fake_client import FakeAdapter, FakeClient

# The fake's device: a pass is 0.1 s of an adapter's own, an update 0.01, an answered chunk 0.3.
PASS, UPDATE, ANSWERS = 0.1, 0.01, 0.3
LENGTH = 4


def same_rows(count: int) -> list[dict[str, str]]:
    """Rows of one length: `LENGTH` tokens are read of each, and the fourth only predicted."""
    return [{"prompt": "ab=", "completion": "c"} for _ in range(count)]


@pytest.fixture
def run_data(tmp_path: Path) -> dict[str, Any]:
    write_lines(tmp_path / "d.jsonl", same_rows(8))
    write_lines(tmp_path / "e.jsonl", same_rows(40))
    sft = {"train": str(tmp_path / "d.jsonl"), "batch_size": 2}
    adapters = [
        {"name": "a", "sft": {**sft, "max_steps": 50, "eval": str(tmp_path / "e.jsonl")}},
        {"name": "b", "seed": 1, "sft": {**sft, "max_steps": 20}},
    ]
    return {"base": "fake", "out": tmp_path / "out", "tensorboard": False, "adapters": adapters}


def measured(
    data: dict[str, Any], client: FakeClient | None = None, events: list[Event] | None = None
) -> Measured:
    run, fake = RunFile.model_validate(data), client or FakeClient()
    tokens = {entry.name: 2 * LENGTH * (entry.sft.max_steps or 0) for entry in run.adapters}
    told = [] if events is None else events
    return measure_run(
        run, tokens, emit=told.append, outside=Dependencies(open_client=lambda _: fake)
    )


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_three_steps_are_made_side_by_side_and_nothing_is_kept(run_data, tmp_path):
    client, before, events = FakeClient(step_seconds=0.01), files(tmp_path), []
    measured(run_data, client, events)
    assert files(tmp_path) == before
    for name in ("a", "b"):
        mine = [what for who, what in client.submitted if who == name]
        steps = [what for what in mine if what in ("forward_backward", "optim_step")]
        assert steps == ["forward_backward", "optim_step"] * STEPS
        assert "save" not in mine and "export" not in mine and mine[-1] == "unload"
        assert client.adapters[name].step == STEPS and client.adapters[name].unloaded
    # Two steps of each are with the worker before the first is read.
    order = [name for name, what in client.submitted if what == "forward_backward"]
    assert order[:4] == ["a", "a", "b", "b"]
    # One evaluation's chunk, behind a small one that warms up, and both before the steps.
    mine = [what for name, what in client.submitted if name == "a"]
    assert mine[:4] == ["forward", "sample", "forward", "sample"]
    assert mine[4] == "forward_backward" and mine.count("sample") == 2
    assert all(
        what in ("forward_backward", "optim_step", "unload")
        for name, what in client.submitted
        if name == "b"
    )
    assert Phase("a", "measuring steps", 3, 3) in events


def test_a_step_is_the_real_plans(run_data, monkeypatch):
    """The batches and the learning rates are those of the run's steps 1 to 3."""
    from tests.unit.runs.driving.conftest import train

    run_data["adapters"] = run_data["adapters"][1:]
    run_data["adapters"][0] |= {"optimizer": {"lr": 0.5, "warmup_steps": 9}}
    rows = [{"prompt": f"x{i}=", "completion": str(i)} for i in range(8)]
    write_lines(Path(run_data["adapters"][0]["sft"]["train"]), rows)
    seen: list[Any] = []
    submit = FakeAdapter.optim_step

    def spied(self, params):
        done = submit(self, params)
        done.add_done_callback(lambda _: seen.append((params.lr, self.weights.tolist())))
        return done

    monkeypatch.setattr(FakeAdapter, "optim_step", spied)
    measured(run_data, FakeClient())
    own, seen[:] = seen[:], []
    assert train(RunFile.model_validate(run_data)) == 0
    assert len(own) == STEPS and len({lr for lr, _ in own}) == STEPS
    assert [lr for lr, _ in own] == [lr for lr, _ in seen[:STEPS]]


def test_the_time_of_a_run_follows_from_its_steps_and_chunks(run_data):
    told = measured(run_data)
    a, b = told.adapters["a"], told.adapters["b"]
    assert (a.steps, b.steps) == (2, 2)
    assert a.step_seconds == pytest.approx(0.22)
    assert a.share_seconds == pytest.approx(PASS + UPDATE)
    assert told.step_seconds == pytest.approx(2 * (PASS + UPDATE))
    assert a.training_seconds == pytest.approx(50 * (PASS + UPDATE))
    assert b.training_seconds == pytest.approx(20 * (PASS + UPDATE))
    assert told.training_seconds == pytest.approx(70 * (PASS + UPDATE))
    # 40 rows are 2.5 chunks; before and after.
    once, first = 2.5 * (PASS + ANSWERS), PASS + ANSWERS
    assert a.evaluation_seconds == pytest.approx(first + 2 * once)
    assert b.evaluation_seconds == 0
    run_data["adapters"][0]["sft"]["eval_every"] = 10  # at 10, 20, 30, 40
    told = measured(run_data | {"mesh": "replicas=2"})
    assert told.adapters["a"].evaluation_seconds == pytest.approx(first + 6 * once)
    assert told.evaluation_seconds == pytest.approx((first + 6 * once) / 2)
    assert told.training_seconds == pytest.approx(70 * (PASS + UPDATE) / 2)
    assert told.peak > 10 << 20 and json.loads(json.dumps(asdict(told)))["peak"] == told.peak


def test_passes_cost_by_tokens_and_updates_by_steps(run_data):
    run = RunFile.model_validate(run_data)
    tokens = {"a": 50 * 2 * LENGTH * 3, "b": 20 * 2 * LENGTH}  # a's later steps are longer
    outside = Dependencies(open_client=lambda _: FakeClient())
    told = measure_run(run, tokens, emit=lambda _: None, outside=outside)
    assert told.adapters["a"].training_seconds == pytest.approx(50 * (3 * PASS + UPDATE))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_run_is_measured_as_far_as_it_goes(run_data, steps: int):
    run_data["adapters"][1]["sft"]["max_steps"] = steps
    client = FakeClient()
    told = measured(run_data, client).adapters["b"]
    assert told.steps == 1 and client.adapters["b"].step == steps
    assert told.training_seconds == pytest.approx(steps * (PASS + UPDATE))


def spoil(run_data: dict[str, Any], how: str) -> None:
    adapter = run_data["adapters"][0]
    if how == "data":
        Path(adapter["sft"]["eval"]).write_text('{"prompt": 3}\n')
    elif how == "no file":
        Path(adapter["sft"]["eval"]).unlink()
    else:
        adapter["optimizer"] = {"lr": 1e9, "warmup_steps": 0}


@pytest.mark.parametrize("how", ["data", "no file", "not finite"])
def test_a_fault_costs_the_adapter_that_has_it(run_data, how: str):
    spoil(run_data, how)
    client = FakeClient()
    told = measured(run_data, client)
    error = told.adapters["a"].error
    expected = "NotFinite" if how == "not finite" else "DataError"
    assert error is not None and error["type"] == expected
    assert told.adapters["b"].training_seconds == pytest.approx(20 * (PASS + UPDATE))
    assert told.training_seconds == told.adapters["b"].training_seconds
    assert all(adapter.unloaded for adapter in client.adapters.values())


def test_ctrl_c_leaves_nothing_behind(run_data, tmp_path, monkeypatch):
    client, before = FakeClient(), files(tmp_path)
    submit = FakeAdapter.optim_step

    def interrupted(self, params):
        os.kill(os.getpid(), signal.SIGINT)
        return submit(self, params)

    monkeypatch.setattr(FakeAdapter, "optim_step", interrupted)
    monkeypatch.setattr("manylora.runs.stopping.ECHO_SECONDS", 60)  # each kill is the same wish
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        measured(run_data, client)
    assert signal.getsignal(signal.SIGINT) is handler
    assert files(tmp_path) == before
    assert all(adapter.unloaded for adapter in client.adapters.values())
    assert all(adapter.step < STEPS for adapter in client.adapters.values())


# --- the command, on a real base --------------------------------------------------------------

RUN = """\
base: seedling
out: out
threads: 1
tensorboard: false
report: false
adapters:
  - name: a
    lora: {rank: 8}
    sft: {train: d.jsonl, eval: e.jsonl, batch_size: 16, max_steps: 8}
  - name: b
    lora: {rank: 16, dtype: bf16}
    sft: {train: d.jsonl, batch_size: 16, max_steps: 4}
"""

# As `manylora` runs it, and then the most that the process ever had.
PEAK = """\
import sys
from manylora.cli.main import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print("PEAK", code, next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    words = "the quick brown fox jumps over the lazy dog "
    for name, count in (("d", 64), ("e", 8)):
        rows = [{"prompt": words[n % 9 :], "completion": " abc" * 12} for n in range(count)]
        write_lines(Path(f"{name}.jsonl"), rows)
    Path("run.yaml").write_text(RUN)
    return tmp_path


def command(code: int, *arguments: str) -> tuple[str, int, str]:
    """What it printed, the most memory that it had, and its words on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, timeout=300
    )
    out, _, told = done.stdout.partition("PEAK ")
    assert told.startswith(f"{code} "), done.stdout + done.stderr
    return out, int(told.split()[1]) * 1024, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_run_that_follows_is_as_it_was_measured(folder: Path):
    before = files(folder)
    out, own, progress = command(0, "train", "run.yaml", "--dry-run", "--measure", "--json")
    told = json.loads(out)["measured"]
    assert files(folder) == before
    assert "opening seedling" in progress
    assert own * 0.98 <= told["peak"] <= own and told["others_peak"] is None
    _, peak, _ = command(0, "train", "run.yaml", "--json")
    assert 0.8 * peak < told["peak"] < 1.2 * peak, (told["peak"], peak)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    for kind in ("training_seconds", "evaluation_seconds"):
        assert summary[kind] / 4 < told[kind] < summary[kind] * 4, (kind, told, summary[kind])


def test_the_table_names_an_adapter_that_cannot_be_measured(folder: Path):
    before = files(folder)
    (folder / "bad.jsonl").write_text('{"prompt": 3}\n')
    settings = ("--set", "adapters.b.sft.train=bad.jsonl")
    out, _, err = command(1, "train", "run.yaml", *settings, "--dry-run", "--measure")
    assert "measured peak of memory: " in out
    rows = [line.split() for line in out.splitlines()]
    assert ["b", "cannot", "be", "planned"] in rows
    assert "error: adapter b: " in err and "bad.jsonl" in err
    assert files(folder) == before | {folder / "bad.jsonl"}


def test_measuring_without_a_dry_run_is_refused(folder: Path, capsys):
    assert main(["train", "run.yaml", "--measure"]) == 2
    assert "--measure goes with --dry-run" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_processes_that_others_started_are_not_measured(folder: Path, capsys, monkeypatch):
    started = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "run.yaml", "--dry-run", "--measure"]) == 2
    assert "without torchrun" in capsys.readouterr().err
