"""`manylora train` on a mesh has the numbers of one process, and goes on when it loses some."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from tests.family import engine_processes
from tests.laws.tiny_runs import command, losses, make_base, make_run, summary, weights

NAMES = ("double", "reverse", "upper")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def finished(run: dict[str, Any], folder: Path, kills: int = 0) -> list[str]:
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
            victims = engine_processes(process.pid)
            if victims:
                os.kill(victims[kills % len(victims)], signal.SIGKILL)
                kills, steps = kills - 1, 0
    assert process.wait(60) == 0, "".join(said)
    reader.join()
    process.stdout.close()
    process.stderr.close()
    assert kills == 0
    return said


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2"])
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
            assert shaken[key].tobytes() == mesh_[key].tobytes(), key
        assert losses(runs["shaken"]["out"], name) == losses(runs["mesh"]["out"], name)
