"""Law 4: a fault belongs to one adapter; its neighbours' weights are the same to the last bit.

A run of three adapters is trained once while all is well. Then each fault in turn befalls the one
in the middle, and the other two must come out as they did.
"""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manylora.checkpoint import training_state
from manylora.config import RunFile
from manylora.runs.train import train_run_file
from manylora.types.adapter_spec import DType
from tests.laws.tiny_runs import losses, make_base, make_run, summary, weights

VICTIM, NEIGHBOURS = "reverse", ("double", "upper")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def well(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights and losses of every adapter when nothing goes wrong."""
    run = make_run(tmp_path_factory.mktemp("well"), base)
    assert train(run) == 0
    names = (VICTIM, *NEIGHBOURS)
    return {name: (weights(run["out"], name), losses(run["out"], name)) for name in names}


def train(run: dict[str, Any]) -> int:
    return train_run_file(RunFile.model_validate(run), view="plain")


Fault = Callable[[dict[str, Any], Path, pytest.MonkeyPatch], None]


def malformed_line(victim: dict[str, Any], data: Path, _: pytest.MonkeyPatch) -> None:
    data.write_text(data.read_text() + '{"prompt": "half a li\n')


def missing_file(victim: dict[str, Any], data: Path, _: pytest.MonkeyPatch) -> None:
    data.unlink()


def over_long_sample(victim: dict[str, Any], data: Path, _: pytest.MonkeyPatch) -> None:
    row = {"prompt": "a " * 60, "completion": "b"}
    data.write_text(data.read_text() + json.dumps(row) + "\n")


def exploding_lr(victim: dict[str, Any], data: Path, _: pytest.MonkeyPatch) -> None:
    victim["optimizer"] |= {"lr": 1e38, "clip_norm": 0.0}


def bad_target(victim: dict[str, Any], data: Path, _: pytest.MonkeyPatch) -> None:
    victim["lora"]["targets"] = ["no_such_layer"]


def full_disk(victim: dict[str, Any], data: Path, patch: pytest.MonkeyPatch) -> None:
    """The victim's tensors do not fit on the disk any more; everybody else's do."""
    write_tensors = training_state.write_tensors

    def full(path: Path, tensors: Any, dtype: DType) -> None:
        if f"/{VICTIM}/" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_tensors(path, tensors, dtype)

    patch.setattr(training_state, "write_tensors", full)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (malformed_line, "DataError", "reverse.jsonl:10"),
        (missing_file, "DataError", "there is no such file"),
        (over_long_sample, "DatumTooLong", "reverse.jsonl:10"),
        (exploding_lr, "NotFinite", "step "),
        (bad_target, "TargetError", "no_such_layer"),
        (full_disk, "SaveFailed", "No space left"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_neighbours_do_not_feel_it(
    fault: Fault,
    kind: str,
    words: str,
    base: Path,
    well: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = make_run(tmp_path, base)
    (victim,) = (entry for entry in run["adapters"] if entry["name"] == VICTIM)
    fault(victim, Path(victim["sft"]["train"]), monkeypatch)

    assert train(run) == 1

    told = summary(run["out"])["adapters"]
    assert told[VICTIM]["status"] == "failed"
    assert told[VICTIM]["error"]["type"] == kind
    assert words in told[VICTIM]["error"]["message"]
    assert not (Path(run["out"]) / VICTIM / "final").exists()
    for name in NEIGHBOURS:
        assert told[name]["status"] == "completed"
        assert (weights(run["out"], name), losses(run["out"], name)) == well[name]


def test_an_adapter_that_was_saved_before_its_fault_goes_on_once_it_is_mended(
    base: Path, well: dict[str, Any], tmp_path: Path
):
    run = make_run(tmp_path, base)
    with pytest.MonkeyPatch.context() as patch:
        full_disk({}, tmp_path, patch)
        assert train(run) == 1
    assert train(run) == 0
    assert (weights(run["out"], VICTIM), losses(run["out"], VICTIM)) == well[VICTIM]


def test_without_the_neighbours_it_is_the_same_adapter(
    base: Path, well: dict[str, Any], tmp_path: Path
):
    run = make_run(tmp_path, base)
    run["adapters"] = [entry for entry in run["adapters"] if entry["name"] == VICTIM]
    assert train(run) == 0
    assert (weights(run["out"], VICTIM), losses(run["out"], VICTIM)) == well[VICTIM]
