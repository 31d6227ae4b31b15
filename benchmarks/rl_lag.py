"""This script shows what older samples cost, and what makes up for it, as a table in Markdown.

    python -m benchmarks.rl_lag [--seeds 1 2 3] [--steps 80] [--lags 0 1 4] > lag.md

Each adapter learns the share of digits on seedling, with 4 groups of 8 and 24 tokens; those of a
seed learn at once. In the table are the first step whose mean reward is 0.9 (– if there is none),
and the mean reward of the last five steps, as the median over the seeds with every seed's value.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.rl.learning import adapter, curves, first_at, last

CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"correct": "none"},
    "behavior": {"proximal": "behavior", "correct": "none"},
    "token_truncate": {"correct": "token_truncate", "max": 2.0},
    "token_mask": {"correct": "token_mask", "max": 2.0},
    "sequence_truncate": {"correct": "sequence_truncate", "max": 2.0},
    "sequence_mask": {"correct": "sequence_mask", "max": 2.0},
}
LEVEL, LAST = 0.9, 5
Curves = dict[str, list[float]]


def measured(seed: int, lags: Sequence[int], steps: int) -> Curves:
    """Return the curve of every lag with every correction."""
    adapters = [
        adapter(
            f"lag{lag}-{name}",
            "digits",
            seed=seed,
            groups=4,
            max_steps=steps,
            off_policy={"lag": lag, **correction},
        )
        for lag in lags
        for name, correction in CORRECTIONS.items()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        return curves(Path(scratch), adapters)


def row(lag: int, name: str, of_seeds: Sequence[Curves]) -> str:
    """Return a line of the table."""
    found = [one[f"lag{lag}-{name}"] for one in of_seeds]
    steps = [first_at(rewards, LEVEL) for rewards in found]
    each = ", ".join("–" if step is None else str(step) for step in steps)
    # One that never came there stands behind all that did.
    middle = statistics.median_low([step or 10**9 for step in steps])
    means = [last(rewards, LAST) for rewards in found]
    mean = ", ".join(f"{one:.2f}" for one in means)
    shown = "–" if middle == 10**9 else str(middle)
    return f"| {lag} | {name} | {shown} ({each}) | {statistics.median(means):.2f} ({mean}) |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 4])
    args = parser.parse_args()
    of_seeds = [measured(seed, args.lags, args.steps) for seed in args.seeds]
    print(f"| lag | correction | first step ≥ {LEVEL} | mean of the last {LAST} |")
    print("|---|---|---|---|")
    for lag in args.lags:
        for name in CORRECTIONS:
            print(row(lag, name, of_seeds))


if __name__ == "__main__":
    main()
