"""Adapters that learn from rewards together get what each gets alone, killed or not."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runs.rl.small_runs import command, entry, kept, trained, write_run

FOUR: dict[str, dict[str, Any]] = {
    "lag0": entry("lag0", "digits", off_policy={"lag": 0}),
    "lag3": entry("lag3", "short", off_policy={"lag": 3, "correct": "token_mask"}),
    "waves": entry(
        "waves",
        "vowels",
        dynamic_sampling={"on": True, "most_waves": 2},
        kl={"coef": 0.05, "reference": "start"},
        loss={"minibatches": 2, "updates": 2},
    ),
    "hook": entry("hook", "play", kl={"coef": 0.1, "where": "reward"}),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    return trained(write_run(folder, list(FOUR.values())))


@pytest.mark.parametrize("name", FOUR)
def test_each_gets_alone_what_it_gets_in_company(name: str, together: Path, tmp_path: Path):
    alone = trained(write_run(tmp_path, [FOUR[name]]))
    assert kept(alone, name) == kept(together, name)


def test_a_neighbour_whose_reward_raises_fails_alone(together: Path, tmp_path: Path):
    path = write_run(tmp_path, [FOUR["lag3"], entry("broken", "raises"), FOUR["waves"]])
    out = trained(path, code=1)
    told = json.loads((out / "summary.json").read_text())["adapters"]
    assert told["broken"]["status"] == "failed"
    assert "the judge is out" in told["broken"]["error"]["message"]
    for name in ("lag3", "waves"):
        assert kept(out, name) == kept(together, name)


def killed_runs(path: Path, seed: int, names: list[str]) -> None:
    """Kill the run at random moments until it has come to its end."""
    moments = random.Random(seed)
    for _ in range(40):
        process = command(path)
        try:
            # Between its start, which takes some seconds, and its end.
            process.wait(timeout=moments.uniform(2.0, 14.0))
        except TimeoutError:
            pass
        except Exception:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            return
        time.sleep(0.1)
    trained(path)


def test_a_run_that_is_killed_ends_with_the_same_bits(together: Path, tmp_path: Path):
    path = write_run(tmp_path, list(FOUR.values()))
    killed_runs(path, 1, list(FOUR))
    for name in FOUR:
        assert kept(tmp_path / "out", name) == kept(together, name), name
