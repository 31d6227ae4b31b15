"""Four tenants of the real base: small tasks, mixed ranks, targets and forms of data."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CITIES = ["Paris", "Rome", "Cairo", "Lima", "Oslo", "Delhi"]
NOTES = ["late again", "works great", "broke twice", "love it", "too loud", "fine so far"]

Row = dict[str, Any]


def chat(user: str, assistant: str) -> Row:
    """A conversation of one turn."""
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    }


def rows(name: str) -> list[Row]:
    """The data of one tenant: as many rows as a step takes."""
    match name:
        case "tone":
            return [chat(f"Rewrite politely: {n}", f"Dear team, {n}. Kind regards.") for n in NOTES]
        case "sql":
            return [
                {"prompt": f"SQL for people in {c}:", "completion": f" SELECT * FROM people_{c};"}
                for c in CITIES
            ]
        case "sentiment":
            signs = ["negative", "positive"]
            return [
                {"prompt": f"{note} =>", "completion": f" {signs[number % 2]}"}
                for number, note in enumerate(NOTES)
            ]
        case _:
            return [chat(f"JSON for {c}", json.dumps({"city": c})) for c in CITIES]


TENANTS: dict[str, dict[str, Any]] = {
    "tone": {"rank": 8, "alpha": 16.0},
    "sql": {"rank": 16, "alpha": 16.0},
    "sentiment": {"rank": 32, "alpha": 64.0},
    "json": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
}
BATCH = len(CITIES)
LR, CLIP = 1e-3, 1.0


def run_file(folder: Path, base: Path, out: str, *, steps: int, **settings: Any) -> dict[str, Any]:
    """A run of all four: whole passes over the data, so that their order does not matter."""
    adapters = []
    for seed, (name, lora) in enumerate(TENANTS.items()):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
        adapters.append(
            {
                "name": name,
                "seed": seed,
                "save_every": 2,
                "lora": lora,
                "optimizer": {"lr": LR, "schedule": "constant", "clip_norm": CLIP},
                "sft": {"train": str(source), "batch_size": BATCH, "max_steps": steps},
            }
        )
    return {
        "base": str(base),
        "out": str(folder / out),
        "threads": 1,
        "tensorboard": False,
        "report": False,
        "adapters": adapters,
        **settings,
    }


def manylora(*words: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with one thread for each kernel."""
    return subprocess.Popen(
        [sys.executable, "-m", "manylora.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def train(folder: Path, run: dict[str, Any], *words: str) -> subprocess.Popen[str]:
    """`manylora train` of `run`; its events come out of stdout, a line each."""
    file = folder / f"{Path(run['out']).name}.yaml"
    file.write_text(yaml.safe_dump(run))
    return manylora("train", str(file), "--json", *words)


def finished(process: subprocess.Popen[str], seconds: float = 900) -> str:
    """What a command that must succeed printed."""
    out, complaint = process.communicate(timeout=seconds)
    assert process.returncode == 0, complaint[-4000:]
    return out


def steps_of(out: Path, name: str) -> list[dict[str, Any]]:
    """The lines of one adapter's metrics.jsonl."""
    text = (out / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def column(steps: Sequence[dict[str, Any]], key: str) -> list[float]:
    """One number of every step."""
    return [float(step[key]) for step in steps]
