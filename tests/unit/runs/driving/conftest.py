"""A small run on the fake client."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manylora.config import RunFile
from manylora.runs.run_folder import RunPaths
from manylora.runs.train import Dependencies, train_run_file
from tests.unit.runs.driving.fake_client import FakeClient, fake_newest_state

Train = Callable[..., int]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_data(tmp_path: Path) -> dict[str, Any]:
    """A run file's data: three adapters with data, seeds and lengths of their own."""
    adapters = []
    for number, name in enumerate(("alpha", "beta", "gamma")):
        rows = [{"prompt": f"{name}{i}=", "completion": f"{i * number}"} for i in range(7)]
        train = write_lines(tmp_path / f"{name}.jsonl", rows)
        held_out = write_lines(tmp_path / f"{name}_eval.jsonl", rows[:2])
        adapters.append(
            {
                "name": name,
                "seed": number,
                "save_every": 4,
                "optimizer": {"lr": 1e-2},
                "sft": {
                    "train": str(train),
                    "eval": str(held_out),
                    "batch_size": 2,
                    "max_steps": 6 + 5 * number,
                },
            }
        )
    return {"base": "fake", "out": tmp_path / "out", "tensorboard": False, "adapters": adapters}


@pytest.fixture
def run_file(run_data: dict[str, Any]) -> RunFile:
    return RunFile.model_validate(run_data)


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def train(run: RunFile, client: FakeClient | None = None, **options: Any) -> int:
    """Train on the fake client."""
    fake = client or FakeClient()
    outside = Dependencies(open_client=lambda _: fake, newest_state=fake_newest_state)
    options.setdefault("view", "plain")
    return train_run_file(run, outside=outside, **options)


def final_weights(run: RunFile, name: str) -> bytes:
    return (RunPaths(run.out).adapter(name).final / "adapter_model.safetensors").read_bytes()


def summary(run: RunFile) -> dict[str, Any]:
    return json.loads(RunPaths(run.out).summary.read_text())


def metrics(run: RunFile, name: str) -> list[dict[str, Any]]:
    text = RunPaths(run.out).adapter(name).metrics.read_text()
    return [json.loads(line) for line in text.splitlines()]
