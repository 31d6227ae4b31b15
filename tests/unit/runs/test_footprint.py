"""The memory that a plan tells, beside what the run that follows takes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from manylora.config import load_run_file
from manylora.runs.footprint import HELD_FOR_ALIVE, HELD_FOR_RECOMPUTED, MemoryPlan
from manylora.runs.run_plan import plan_run

RUN = """\
base: seedling
out: out
threads: 1
tensorboard: false
report: false
adapters:
  - name: a
    lora: {rank: 8}
    sft: {train: d.jsonl, eval: e.jsonl, batch_size: 32, max_steps: 4}
  - name: b
    lora: {rank: 16, dtype: bf16}
    sft: {train: d.jsonl, eval: e.jsonl, batch_size: 32, max_steps: 4}
"""

# As `manylora` runs it, and then the most that the process ever had.
PEAK = """\
import sys
from manylora.cli.main import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
peak = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
print("PEAK", code, peak)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    words = "the quick brown fox jumps over the lazy dog "
    for name, count in (("d", 64), ("e", 8)):
        rows = [{"prompt": words[n % 9 :], "completion": " abc" * 12} for n in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text(RUN)
    return tmp_path


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, timeout=300
    )
    assert "PEAK 0" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["false", "true"])
def test_the_peak_of_a_run_is_near_the_plans(folder: Path, way: str):
    Path("run.yaml").write_text(f"activation_checkpointing: {way}\n{RUN}")
    told = command("train", "run.yaml", "--dry-run", "--json").partition("PEAK")[0]
    planned = json.loads(told)["memory"]["total"]
    assert not (folder / "out").exists()
    found = re.search(r"PEAK 0 (\d+)", command("train", "run.yaml", "--json"))
    assert found is not None
    peak = int(found[1]) * 1024
    assert 0.8 * peak < planned < 1.2 * peak, (planned, peak)


def test_the_parts_follow_the_run_file(folder: Path):
    plain = plan_run(load_run_file("run.yaml")).memory
    assert plain.recomputed is not None
    alive = plain.plain / HELD_FOR_ALIVE
    assert plain.recomputed / HELD_FOR_RECOMPUTED < alive / 2
    assert plain.activations == plain.plain and plain.decode_cache > 0 and plain.ranks == 1
    assert 0 < plain.decode_weights <= plain.base
    assert plain.needed == (
        plain.libraries + plain.base + plain.decode_weights + plain.adapters + plain.kept_cache
        + max(plain.activations, plain.decode_cache - plain.kept_cache)
    )  # fmt: skip
    quantized = plan_run(load_run_file("run.yaml", ["quantization=nf4"])).memory
    assert quantized.decode_weights == 0
    lighter = plan_run(load_run_file("run.yaml", ["activation_checkpointing=true"])).memory
    assert lighter.activations == plain.recomputed
    small = plan_run(load_run_file("run.yaml", ["token_budget=256"])).memory
    assert small.activations < plain.activations / 3
    two = plan_run(load_run_file("run.yaml", ["mesh=dp=2"])).memory
    assert two.decode_weights == 0
    assert two.base == plain.base // 2 and two.ranks == 2 and two.adapters < plain.adapters


def test_what_cannot_fit_is_told_with_what_would():
    plan = MemoryPlan(
        process=1 << 20, base=3 << 20, adapters=9 << 20, plain=2 << 20, recomputed=1 << 20,
        activations=2 << 20, decode_cache=0, ranks=1, free=14 << 20,
    )  # fmt: skip
    assert plan.refusal() is None
    tight = MemoryPlan(
        **{field: getattr(plan, field) for field in plan.__slots__} | {"free": 13 << 20}
    )
    refusal = str(tight.refusal())
    assert "needs 14.0 MiB more" in refusal and "13.0 MiB is free" in refusal
    assert "9.0 MiB would fit" in refusal


def test_an_adapter_that_no_machine_holds_is_told_at_the_plan(folder: Path):
    memory = plan_run(load_run_file("run.yaml", ["adapters.a.lora.rank=65536"])).memory
    huge = replace(memory, free=1 << 30)
    assert memory.adapters > 16 << 30 and huge.refusal() is not None
