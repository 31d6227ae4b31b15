"""Small real runs of reinforcement learning on seedling, and what of them is compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from manylora.runs.rl.rollout_record import read_step

REWARDS = """
import pathlib
import time

def pay(name):
    with (pathlib.Path(__file__).parent / "paid.txt").open("a") as file:
        file.write(name + "\\n")

def digits(completions, **_):
    pay("digits")
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def vowels(completion, **_):
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))

def short(completions, **_):
    pay("short")
    return [-abs(len(text) - 20) / 20 for text in completions]

def slow(completions, **_):
    time.sleep(0.05)
    return [float(len(text)) for text in completions]

def raises(completions, **_):
    raise ValueError("the judge is out")

async def play(client, row):
    turn = await client.sample(row["prompt"], max_tokens=6)
    turn = await client.sample(client.extend(" = "), max_tokens=6)
    return float(sum(c.isdigit() for c in turn.text))
"""
WORDS = ["river", "stone", "apple", "cloud", "tiger", "paper", "lemon", "chair", "green", "music"]


def entry(name: str, reward: str = "digits", **rl: Any) -> dict[str, Any]:
    """Return an adapter of a run file; two prompts, four samples each, six tokens."""
    settings: dict[str, Any] = {
        "prompts": "words.jsonl",
        "reward": f"rewards.py:{reward}",
        "groups": 2,
        "group_size": 4,
        "max_steps": 4,
        "sampling": {"max_tokens": 6},
    }
    if reward == "play":
        del settings["reward"]
        settings["rollout"] = "rewards.py:play"
    return {
        "name": name,
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"lr": 5e-3, "schedule": "constant"},
        "save_every": 2,
        "seed": 3,
        "rl": settings | rl,
    }


def write_run(folder: Path, adapters: list[dict[str, Any]], out: str = "out") -> Path:
    """Write a run file with everything beside it, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    rows = "".join(json.dumps({"prompt": f"{word}: "}) + "\n" for word in WORDS)
    (folder / "words.jsonl").write_text(rows)
    run = {
        "base": "seedling",
        "out": str(folder / out),
        "tensorboard": False,
        "report": False,
        "adapters": adapters,
    }
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def command(path: Path, *more: str) -> "subprocess.Popen[bytes]":
    """Start `manylora train` in a process of its own."""
    main = "from manylora.cli.main import main; raise SystemExit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", main, "train", str(path), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ,
    )


def progress(out: Path) -> int:
    """Return how many lines a run has written of steps and groups, torn ones and all."""
    files = [*out.glob("*/metrics.jsonl"), *out.glob("*/rollouts/pending.jsonl")]
    files += out.glob("*/rollouts/step-*.jsonl.gz")
    return sum(_lines(file) for file in files)


def _lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n") if file.suffix == ".jsonl" else 1
    except FileNotFoundError:
        return 0


def trained(path: Path, code: int = 0) -> Path:
    """Train to the end and return the output folder."""
    process = command(path)
    _, told = process.communicate(timeout=300)
    assert process.returncode == code, told.decode()[-3000:]
    return Path(yaml.safe_load(path.read_text())["out"])


def kept(out: Path, name: str) -> dict[str, Any]:
    """Return what of an adapter's run must be the same each time: all but times."""
    folder = out / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": (folder / "final/adapter_model.safetensors").read_bytes(),
        "metrics": [without_seconds(row) for row in rows],
        "rollouts": [without_seconds(read_step(folder / "rollouts", row["step"])) for row in rows],
    }


def without_seconds(value: Any) -> Any:
    """Return a value without the times in it."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k}
    return [without_seconds(one) for one in value] if isinstance(value, list) else value
