"""This benchmark compares a dry run with the run itself: peak memory, seconds of the device.

    python -m benchmarks.plan [BASE …] [--steps 6] [--tokens 24] [--out FILE.json]

It trains on each base (seedling, and the toy of `benchmarks.multi_tenant` with seedling's
tokenizer), with and without activation checkpointing, two adapters that are evaluated before and
after. `train --dry-run --measure` and `train` run in separate processes, one after the other; the
lines show said / taken, and our goal is 0.8 to 1.2. A plan is of the heaviest possible batch:
where the adapters never meet in one, a run takes less.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.multi_tenant import machine, toy_llama
from manylora.models import resolve_base

RUN = """\
base: {base}
out: out
threads: 1
tensorboard: false
report: false
activation_checkpointing: {checkpointing}
adapters:
  - name: a
    lora: {{rank: 8}}
    sft: {{train: train.jsonl, eval: eval.jsonl, batch_size: 16, max_steps: {steps}}}
  - name: b
    lora: {{rank: 16}}
    sft: {{train: train.jsonl, eval: eval.jsonl, batch_size: 16, max_steps: {steps}}}
"""
UNITS = (("memory", 2**20, "MiB"), ("training", 1, "s"), ("evaluation", 1, "s"))
# As `manylora` runs it, and then the most that the process ever had.
COMMAND = """\
import sys
from manylora.cli.main import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print("PEAK", code, next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


def toy_with_tokenizer(folder: Path) -> Path:
    """Make the toy, whose vocabulary has room for the tokenizer's ids."""
    toy_llama(folder)
    for file in Path(resolve_base("seedling")).glob("*token*"):
        shutil.copy(file, folder)
    return folder


def write_data(folder: Path, tokens: int) -> None:
    """Write rows of different lengths, about `tokens` on average."""
    words = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "ran")
    for name, count in (("train", 96), ("eval", 8)):
        rows = [
            {
                "prompt": " ".join(words[n % 7 : n % 7 + 4]) + ":",
                "completion": " "
                + " ".join(words[i % 11] for i in range(tokens // 2 + n % tokens)),
            }
            for n in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def command(folder: Path, *arguments: str) -> tuple[str, int]:
    """Run a command of ours; return what it prints, and its peak in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], cwd=folder, capture_output=True, text=True
    )
    found = re.search(r"PEAK 0 (\d+)", done.stdout)
    if found is None:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout[: found.start()], int(found[1]) * 1024


def compare(base: str, *, checkpointing: bool, steps: int, tokens: int) -> dict[str, Any]:
    """Plan and measure one run, and then make it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, tokens)
        text = RUN.format(base=base, checkpointing=str(checkpointing).lower(), steps=steps)
        (folder / "run.yaml").write_text(text)
        told, _ = command(folder, "train", "run.yaml", "--dry-run", "--measure", "--json")
        plan = json.loads(told)
        told, peak = command(folder, "train", "run.yaml", "--json")
    summary = json.loads(told.splitlines()[-1])["summary"]
    said, measured = plan["memory"]["total"], plan["measured"]
    pairs = {
        "memory": (said, peak),
        "training": (measured["training_seconds"], summary["training_seconds"]),
        "evaluation": (measured["evaluation_seconds"], summary["evaluation_seconds"]),
    }
    return {"base": Path(base).name, "checkpointing": checkpointing, **pairs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bases", nargs="*", metavar="BASE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "runs": []}
    print(json.dumps(report["machine"]))
    with tempfile.TemporaryDirectory() as name:
        bases = settings.bases or ["seedling", str(toy_with_tokenizer(Path(name) / "toy"))]
        for base in bases:
            for way in (False, True):
                row = compare(base, checkpointing=way, steps=settings.steps, tokens=settings.tokens)
                report["runs"].append(row)
                show(row)
    if settings.out:
        settings.out.write_text(json.dumps(report, indent=2) + "\n")


def show(row: dict[str, Any]) -> None:
    """Print one line: said, taken, and their ratio."""
    told = [
        f"{what} {said / size:,.1f} of {taken / size:,.1f} {unit} = {said / max(taken, 1e-9):.2f}"
        for what, size, unit in UNITS
        for said, taken in (row[what],)
    ]
    way = "checkpointing" if row["checkpointing"] else "plain"
    print(f"{row['base']:32s} {way:14s} {'   '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
