"""Law 5: what was acknowledged is not lost.

`manylora train` is killed and started again with the same file. In the end weights, losses,
evaluations and samples are those of a run that nobody disturbed. The quick test dies of an error
that nothing catches; the others run in a process of their own and are really killed.
"""

import json
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from manylora.config import RunFile
from manylora.runs.events import StepDone
from manylora.runs.metrics_file import MetricsFile
from manylora.runs.run_folder import RunPaths
from manylora.runs.train import _Run, train_run_file
from tests.laws.tiny_runs import command, losses, make_base, make_run, summary, weights
from tests.threads import SESSION, under

NAMES = ("double", "reverse", "upper")
STEPS = 24
LIMIT = 120


class Process:
    """A run that is watched through its JSON lines."""

    def __init__(self, run: dict[str, Any], folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._process = command(run, folder / "run.yaml")
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._hear)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # the last one may be torn by the kill
                self.events.append(json.loads(line))

    def _hear(self) -> None:
        assert self._process.stderr is not None
        self._errors += list(self._process.stderr)

    def count(self, event: str) -> int:
        return sum(one["event"] == event for one in tuple(self.events))

    def wait_for(self, event: str, count: int = 1) -> None:
        """Until so many of these events have come, or the run is over."""
        end = time.monotonic() + LIMIT
        while self.count(event) < count and self._process.poll() is None:
            assert time.monotonic() < end, "".join(self._errors)
            time.sleep(0.002)

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def exit_code(self) -> int:
        try:
            code = self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        assert code in (0, 130, -signal.SIGKILL), "".join(self._errors)
        return code


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = make_run(folder, base, steps=STEPS)
    assert Process(run, folder).exit_code() == 0
    return ending(run)


def train(run: dict[str, Any]) -> int:
    """In this process; a run file sets the number of threads for all of it."""
    with under(SESSION):
        return train_run_file(RunFile.model_validate(run), view="plain")


def ending(run: dict[str, Any]) -> dict[str, Any]:
    """All that a run has to show for itself, but for the time that it took."""
    told = summary(run["out"])["adapters"]
    shown = ("status", "steps", "first_loss", "last_loss", "eval_before", "eval_after", "tokens")
    return {
        name: {
            "weights": weights(run["out"], name),
            "losses": losses(run["out"], name),
            "samples": RunPaths(Path(run["out"])).adapter(name).samples.read_text(),
            **{key: told[name][key] for key in shown},
        }
        for name in NAMES
    }


def saved_steps(run: dict[str, Any], name: str) -> set[int]:
    folder = RunPaths(Path(run["out"])).adapter(name).checkpoints
    return {int(path.name[5:]) for path in folder.glob("step-*")}


class Killed(BaseException):
    """Nothing catches it."""


def test_a_run_that_dies_anywhere_goes_on_from_its_newest_states(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = make_run(tmp_path / "whole", base)
    assert train(whole) == 0
    run = make_run(tmp_path / "disturbed", base)
    append = MetricsFile.append
    left = 0  # lines until the death; afterwards nothing is written any more

    def dying(self: MetricsFile, step: StepDone) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        append(self, step)

    monkeypatch.setattr(MetricsFile, "append", dying)
    for left in (13, 1, 7):  # noqa: B007 - read by `dying`
        with pytest.raises(Killed):
            train(run)
    left = 1000
    assert train(run) == 0
    assert ending(run) == ending(whole)


def test_a_run_that_dies_before_it_says_that_it_is_done_says_so_later(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(tmp_path, base)
    with monkeypatch.context() as patch:
        write = _Run._write_summary

        def dying(self: _Run) -> dict[str, Any]:
            if all(outcome.status == "completed" for outcome in self.outcomes.values()):
                raise Killed
            return write(self)

        patch.setattr(_Run, "_write_summary", dying)
        with pytest.raises(Killed):
            train(run)
    assert summary(run["out"])["status"] == "running"
    assert train(run) == 0
    told = summary(run["out"])
    assert told["status"] == "completed"
    assert {told["adapters"][name]["status"] for name in NAMES} == {"completed"}
    assert train(run) == 0
    assert summary(run["out"]) == told, "what a run has told of itself stays"


def constant(run: dict[str, Any]) -> dict[str, Any]:
    """The run with learning rates that do not depend on its end."""
    for adapter in run["adapters"]:
        adapter["optimizer"]["schedule"] = "constant"
    return run


def test_a_finished_run_made_longer_is_the_run_that_was_so_long_from_the_start(
    base: Path, tmp_path: Path
):
    whole = constant(make_run(tmp_path / "whole", base, steps=11))
    assert train(whole) == 0
    short = constant(make_run(tmp_path / "short", base, steps=4))
    assert train(short) == 0
    first = ending(short)
    longer = constant(make_run(tmp_path / "short", base, steps=11))
    assert train(longer) == 0
    told = ending(longer)
    assert told == ending(whole)
    assert all(told[name]["weights"] != first[name]["weights"] for name in NAMES)


def test_killed_once_in_the_middle(base: Path, undisturbed: dict[str, Any], tmp_path: Path):
    run = make_run(tmp_path, base, steps=STEPS)
    first = Process(run, tmp_path)
    first.wait_for("step_done", 30)
    first.send(signal.SIGKILL)
    assert first.exit_code() == -signal.SIGKILL
    kept = {name: max(saved_steps(run, name), default=0) for name in NAMES}

    second = Process(run, tmp_path)
    assert second.exit_code() == 0
    for name in NAMES:
        # It went on from what was on disk: no step before that was made again.
        began = [e["step"] for e in second.events if e["event"] == "step_done"]
        assert began
        resumed = summary(run["out"])["adapters"][name]["resumed_from"]
        assert resumed == kept[name] or summary(run["out"])["adapters"][name]["steps"] == resumed
    assert ending(run) == undisturbed


def test_killed_at_random_points_until_done(
    base: Path, undisturbed: dict[str, Any], tmp_path: Path
):
    chance = random.Random(20)
    run = make_run(tmp_path, base, steps=STEPS)
    for _ in range(7):
        process = Process(run, tmp_path)
        process.wait_for(chance.choice(["phase", "adapter_started", "step_done"]))
        time.sleep(chance.uniform(0.0, 0.6))
        process.send(signal.SIGKILL)
        process.exit_code()
    assert Process(run, tmp_path).exit_code() == 0
    assert ending(run) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_the_very_step(
    number: int, base: Path, undisturbed: dict[str, Any], tmp_path: Path
):
    run = make_run(tmp_path, base, steps=STEPS)
    first = Process(run, tmp_path)
    first.wait_for("step_done", 20)
    first.send(number)
    assert first.exit_code() == 130
    told = summary(run["out"])
    assert told["status"] == "cancelled"
    for name in NAMES:
        steps = told["adapters"][name]["steps"]
        assert len(losses(run["out"], name)) == steps
        assert not steps or steps in saved_steps(run, name)
    second = Process(run, tmp_path)
    assert second.exit_code() == 0
    repeated = [(e["adapter"], e["step"]) for e in second.events if e["event"] == "step_done"]
    made = [(e["adapter"], e["step"]) for e in first.events if e["event"] == "step_done"]
    assert not set(repeated) & set(made)
    assert ending(run) == undisturbed


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    base: Path, undisturbed: dict[str, Any], tmp_path: Path
):
    run = make_run(tmp_path, base, steps=STEPS)
    first = Process(run, tmp_path)
    first.wait_for("checkpoint_saved", 12)
    first.send(signal.SIGKILL)
    first.exit_code()
    name = max(NAMES, key=lambda name: len(saved_steps(run, name)))
    *_, before, newest = sorted(saved_steps(run, name))
    tensors = RunPaths(Path(run["out"])).adapter(name).state(newest) / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    second = Process(run, tmp_path)
    assert second.exit_code() == 0
    assert summary(run["out"])["adapters"][name]["resumed_from"] == before
    assert ending(run) == undisturbed
