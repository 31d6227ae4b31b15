"""Adapters learn what they are paid for: four rewards at once, every preset, older samples."""

from pathlib import Path

import pytest

from tests.rl.learning import adapter, curves, first_at, last

pytestmark = pytest.mark.rl
AT_LEAST = {"digits": 0.95, "vowels": 0.5, "the_word": 0.95, "length": -0.08}
PRESETS = ("grpo", "dapo", "dr_grpo", "rloo", "gspo", "cispo")
SEEDS = (1, 2, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_four_rewards_at_once(seed: int, tmp_path: Path):
    found = curves(tmp_path, [adapter(name, name, seed=seed) for name in AT_LEAST])
    reached = {name: last(rewards) for name, rewards in found.items()}
    assert {name for name in AT_LEAST if reached[name] < AT_LEAST[name]} == set(), reached


def test_every_preset_learns(tmp_path: Path):
    """All six at once; each begins at nearly no reward."""
    adapters = [
        adapter(preset, "digits", seed=1, groups=4, preset=preset, max_steps=80)
        for preset in PRESETS
    ]
    found = curves(tmp_path, adapters)
    assert all(rewards[0] < 0.1 for rewards in found.values())
    reached = {name: last(rewards) for name, rewards in found.items()}
    assert min(reached.values()) >= 0.9, reached


def test_older_samples_cost_some_steps(tmp_path: Path):
    """With 32 sequences a step; a lag's own first steps are among those that are counted."""
    ways = {
        "lag0": {"lag": 0},
        "lag1": {"lag": 1},
        "lag4": {"lag": 4},
        "free": {"max_staleness": 4},
    }
    adapters = [
        adapter(name, "digits", seed=1, groups=4, max_steps=90, off_policy=off_policy)
        for name, off_policy in ways.items()
    ]
    steps = {name: first_at(rewards, 0.9) for name, rewards in curves(tmp_path, adapters).items()}
    alone = steps["lag0"]
    assert alone is not None, steps
    for name, factor in (("lag1", 1.5), ("lag4", 3.0), ("free", 3.0)):
        reached = steps[name]
        assert reached is not None and reached <= factor * alone, steps
