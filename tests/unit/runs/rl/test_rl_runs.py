"""Whole runs that learn from rewards, as processes: together, alone, killed, stopped."""

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runs.rl.small_runs import command, entry, kept, progress, trained, write_run

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


def test_each_gets_without_its_neighbours_what_it_gets_in_company(together: Path, tmp_path: Path):
    """One after the other in a process whose others fail or are of another kind of run."""
    path = write_run(tmp_path, [FOUR["lag3"], entry("broken", "raises"), FOUR["waves"]])
    out = trained(path, code=1)
    told = json.loads((out / "summary.json").read_text())["adapters"]
    assert told["broken"]["status"] == "failed"
    assert "the judge is out" in told["broken"]["error"]["message"]
    for name in ("lag3", "waves"):
        assert kept(out, name) == kept(together, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_each_gets_alone_what_it_gets_in_company(name: str, together: Path, tmp_path: Path):
    alone = trained(write_run(tmp_path, [FOUR[name]]))
    assert kept(alone, name) == kept(together, name)


def killed_run(path: Path, seed: int, *, kills: int, sent: int = signal.SIGKILL) -> int:
    """End the run at random moments of its own progress, then let it come to its end.

    Returns:
        How often it was ended before it had come there itself.
    """
    draw, out, done = random.Random(seed), path.parent / "out", 0
    for _ in range(kills):
        process = command(path)
        # So many further lines of metrics, of groups, of steps; and a moment within a line's time.
        until = progress(out) + draw.randint(0, 9)
        while process.poll() is None and progress(out) <= until:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.1))
        process.send_signal(sent)
        _, told = process.communicate(timeout=300)
        if process.returncode == 0:
            return done
        assert process.returncode in (-sent, 130), told.decode()[-3000:]
        done += 1
    trained(path)
    return done


def test_a_run_that_is_killed_ends_with_the_same_bits(together: Path, tmp_path: Path):
    path = write_run(tmp_path, list(FOUR.values()))
    assert killed_run(path, 1, kills=1) == 1
    for name in FOUR:
        assert kept(tmp_path / "out", name) == kept(together, name), name


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_ends_with_the_same_bits(together: Path, tmp_path: Path):
    """Its samples are in the making, and made again."""
    path = write_run(tmp_path, list(FOUR.values()))
    assert killed_run(path, 2, kills=3, sent=signal.SIGINT) > 0
    for name in FOUR:
        assert kept(tmp_path / "out", name) == kept(together, name), name


LAGS = {lag: entry(f"lag{lag}", "digits", off_policy={"lag": lag}) for lag in (0, 1, 3)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    return trained(write_run(folder, list(LAGS.values())))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_is_killed_at_random_ends_with_the_same_bits(
    seed: int, undisturbed: Path, tmp_path: Path
):
    """Three adapters with lag 0, 1 and 3; what was paid twice was not on the disk before a kill."""
    path = write_run(tmp_path, list(LAGS.values()))
    kills = killed_run(path, seed, kills=4)
    for name in (one["name"] for one in LAGS.values()):
        assert kept(tmp_path / "out", name) == kept(undisturbed, name), name
    once = paid(undisturbed.parent)
    # A kill costs at most what each adapter has in the making (two groups of four of each step from
    # this one to `lag` further ones), and nothing else is paid again.
    most = once + kills * sum(2 * 4 * (lag + 1) for lag in LAGS)
    assert once <= paid(tmp_path) <= most


def paid(folder: Path) -> int:
    return Counter((folder / "paid.txt").read_text().split())["digits"]


def test_a_recorded_reward_is_not_paid_twice(tmp_path: Path):
    """Killed when some groups of the first steps are on the disk."""
    path = write_run(tmp_path, [entry("one", "digits", off_policy={"lag": 1}, max_steps=3)])
    pending = tmp_path / "out" / "one" / "rollouts" / "pending.jsonl"
    process = command(path)
    while process.poll() is None and not (pending.exists() and _whole(pending)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    on_disk, before = _whole(pending), paid(tmp_path)
    trained(path)
    # Six groups of four in all: those that were written are not paid again, the others are.
    assert on_disk > 0
    assert paid(tmp_path) == before + 4 * (6 - on_disk)


def _whole(pending: Path) -> int:
    return pending.read_bytes().count(b"\n")
