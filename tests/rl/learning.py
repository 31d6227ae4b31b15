"""Runs that learn simple rewards on seedling, and how far they have come."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REWARDS = """
def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]

def the_word(completions, **_):
    return [min(1.0, text.count("the") * 3 / max(1, len(text))) for text in completions]

def length(completions, **_):
    return [-abs(len(text) - 20) / 20 for text in completions]
"""
WORDS = ["river", "stone", "apple", "cloud", "tiger", "paper", "lemon", "chair", "green", "music"]


def adapter(name: str, reward: str, *, seed: int, groups: int = 8, **rl: Any) -> dict[str, Any]:
    """Return an adapter of a run file: groups of eight, 24 tokens, 40 steps."""
    return {
        "name": name,
        "lora": {"rank": 8, "alpha": 16},
        "optimizer": {"lr": 5e-3, "schedule": "constant", "clip_norm": 1.0},
        "save_every": 0,
        "seed": seed,
        "rl": {
            "prompts": "words.jsonl",
            "reward": f"rewards.py:{reward}",
            "groups": groups,
            "group_size": 8,
            "max_steps": 40,
            "sampling": {"max_tokens": 24},
            "off_policy": {"lag": 0},
            "keep_rollouts": {"newest": 1},
            **rl,
        },
    }


def curves(folder: Path, adapters: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Train all of them in one run; return the mean reward of each step by adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    rows = "".join(json.dumps({"prompt": f"{word}: "}) + "\n" for word in WORDS)
    (folder / "words.jsonl").write_text(rows)
    out = folder / "out"
    run = {"base": "seedling", "out": str(out), "tensorboard": False, "adapters": [*adapters]}
    (folder / "run.yaml").write_text(yaml.safe_dump({**run, "report": False}))
    main = "from manylora.cli.main import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", main, "train", str(folder / "run.yaml")],
        capture_output=True,
        env=os.environ,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-3000:])
    return {one["name"]: _rewards(out / one["name"]) for one in adapters}


def _rewards(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["reward"] for line in lines]


def last(rewards: Sequence[float], count: int = 3) -> float:
    """Return the mean of the last steps."""
    return sum(rewards[-count:]) / count


def first_at(rewards: Sequence[float], level: float) -> int | None:
    """Return the first step whose mean reward is that high."""
    return next((step for step, one in enumerate(rewards, start=1) if one >= level), None)
