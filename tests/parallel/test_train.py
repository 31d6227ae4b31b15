"""`manylora train` on a mesh has the numbers of one process, and goes on when it loses some."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load

from manylora.config import load_run_file
from manylora.processes.peer_addresses import free_port
from manylora.runs.train import open_trainer
from manylora.types import ConfigError
from tests.family import engine_processes
from tests.laws.tiny_runs import command, losses, make_base, make_run, summary, weights

NAMES = ("double", "reverse", "upper")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def finished(
    run: dict[str, Any],
    folder: Path,
    kills: int = 0,
    engine: Callable[[int], Collection[int]] = engine_processes,
) -> list[str]:
    """Run it to the end, killing one of its engine's processes after each of the first steps."""
    process = command(run, folder / "run.yaml")
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    steps = 0
    for line in process.stdout:
        steps += '"StepDone"' in line or '"step"' in line
        if kills and steps >= 4:
            victims = list(engine(process.pid))
            if victims:
                os.kill(victims[kills % len(victims)], signal.SIGKILL)
                kills, steps = kills - 1, 0
    assert process.wait(60) == 0, "".join(said)
    reader.join()
    process.stdout.close()
    process.stderr.close()
    assert kills == 0
    return said


@pytest.mark.parametrize(
    "mesh",
    ["dp=2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("tp=2", "replicas=2"))],
)
def test_a_run_on_a_mesh_is_the_run_and_survives_its_processes(
    base: Path, mesh: str, tmp_path: Path
) -> None:
    runs = {}
    for name, settings, kills in (("one", {}, 0), ("mesh", {"mesh": mesh}, 0),
                                  ("shaken", {"mesh": mesh}, 2)):  # fmt: skip
        folder = tmp_path / name
        runs[name] = {**make_run(folder, base), **settings}
        finished(runs[name], folder, kills)
        told = summary(runs[name]["out"])["adapters"]
        assert all(told[one]["status"] == "completed" for one in NAMES)
    for name in NAMES:
        alone, mesh_, shaken = (load(weights(runs[r]["out"], name)) for r in runs)
        assert alone.keys() == mesh_.keys() == shaken.keys()
        for key, expected in alone.items():
            np.testing.assert_allclose(mesh_[key], expected, rtol=2e-3, atol=1e-4)
            assert "replicas" not in mesh or mesh_[key].tobytes() == expected.tobytes()
            assert shaken[key].tobytes() == mesh_[key].tobytes(), key
        assert losses(runs["shaken"]["out"], name) == losses(runs["mesh"]["out"], name)


def torchrun(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "-m", "manylora.cli.main", "train", str(file)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def srun(file: Path) -> None:
    """As SLURM starts processes: their places in the environment, and nothing else."""
    told = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(os.getpid()),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "manylora.cli.main", "train", str(file)],
            stdout=subprocess.DEVNULL,
            env={**os.environ, **told, "SLURM_PROCID": str(number)},
        )
        for number in (1, 0)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]


@pytest.mark.parametrize("start", [torchrun, pytest.param(srun, marks=pytest.mark.slow)])
def test_processes_that_others_have_started_are_accepted(
    base: Path, start: Callable[[Path], None], tmp_path: Path
) -> None:
    runs = {name: {**make_run(tmp_path / name, base), "mesh": "dp=2"} for name in ("own", "theirs")}
    finished(runs["own"], tmp_path / "own")
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(runs["theirs"]))
    start(file)
    assert summary(runs["theirs"]["out"])["status"] == "completed"
    for name in NAMES:
        assert weights(runs["theirs"]["out"], name) == weights(runs["own"]["out"], name)
    assert not list(Path(runs["theirs"]["out"]).glob(".meeting*"))


def test_a_base_that_started_processes_cannot_open_is_named(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**make_run(tmp_path, nothing), "mesh": "dp=2"}))
    with pytest.raises(AssertionError, match="cannot open base"):
        torchrun(file)


def test_a_mesh_of_another_size_than_was_started(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**make_run(tmp_path, base), "mesh": "dp=3"}))
    told = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    done = subprocess.run(
        [sys.executable, "-m", "manylora.cli.main", "train", str(file)],
        capture_output=True, text=True, check=False, env={**os.environ, **told},
    )  # fmt: skip
    assert done.returncode == 2
    assert "2 processes were started" in done.stderr
    assert "--mesh dp=2" in done.stderr


def test_a_cluster_is_not_asked_for_processes_that_are_there(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = {**make_run(tmp_path, base), "mesh": "dp=2", "ray": "auto"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="'auto', and 2 processes were started already"):
        open_trainer(load_run_file(tmp_path / "run.yaml"))
