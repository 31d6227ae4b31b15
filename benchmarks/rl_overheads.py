"""What a run of reinforcement learning does besides sampling and training: see `benchmarks.rl`."""

import contextlib
import io
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rl_arms import Counts, RlLoad, counted, write_run_file
from manylora.api.client import AdapterClient
from manylora.config import load_run_file
from manylora.engine import Engine
from manylora.hosting.host import Host
from manylora.runs.metrics_file import read_metrics
from manylora.runs.report import write_report
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.rollout_record import RolloutRecord, read_step
from manylora.runs.run_folder import RunPaths
from manylora.runs.train import Dependencies, train_run_file
from manylora.scheduler import BatchReport
from manylora.types import Opening
from tests.unit.runs import sampled_run


class CopyingEngine(Engine):
    """A `CopyingEngine` knows how long it has frozen copies of weights, and let go of them."""

    copies = 0
    copying = 0.0

    def snapshot(self, name: str, snapshot: str) -> None:
        began = time.perf_counter()
        super().snapshot(name, snapshot)
        self.copying += time.perf_counter() - began
        self.copies += 1

    def drop_snapshot(self, snapshot: str) -> None:
        began = time.perf_counter()
        super().drop_snapshot(snapshot)
        self.copying += time.perf_counter() - began


def write_run(folder: Path, load: RlLoad, adapters: int, threads: int) -> Path:
    """Write a run file of so many adapters, with the default lag."""
    entries = [load.entry(number, lag=1) for number in range(adapters)]
    return write_run_file(folder, "run", entries, threads)


def train(path: Path, client: AdapterClient) -> tuple[float, float]:
    """Train a run file on an open client; return the seconds of wall and of the processor."""
    outside = Dependencies(open_client=lambda run: nullcontext(client))
    wall, cpu = time.perf_counter(), time.process_time()
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = train_run_file(load_run_file(path), view="plain", outside=outside)
    if code:
        raise RuntimeError(told.getvalue()[-3000:])
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_publish(
    folder: Path, counts: Sequence[int], steps: int, threads: int
) -> list[dict[str, Any]]:
    """Measure what publishing takes of the engine's time, with 8 sequences a step."""
    rows = []
    engine = CopyingEngine(Opening("seedling", threads=threads))
    spent: dict[str, float] = defaultdict(float)

    def observe(report: BatchReport) -> None:
        spent[report.kind] += report.seconds

    host = Host([engine], token_budget=4096, observe=observe)
    client = AdapterClient(host)
    try:
        train(write_run(folder / "warm", RlLoad(sequences=2, steps=1), 1, threads), client)
        for count in counts:
            spent.clear()
            engine.copies, engine.copying = 0, 0.0
            path = write_run(
                folder / f"publish{count}", RlLoad(sequences=8, steps=steps), count, threads
            )
            wall, _ = train(path, client)
            rows.append(_publish_row(path.with_suffix(""), count, wall, engine, spent))
            print(publish_line(rows[-1]), flush=True)
    finally:
        host.close(cancel=True)
    return rows


def _publish_row(
    out: Path, count: int, wall: float, engine: CopyingEngine, spent: dict[str, float]
) -> dict[str, Any]:
    rows = [row for path in out.glob("*/metrics.jsonl") for row in read_metrics(path)]
    training = spent["forward_backward"] + spent["optim_step"]
    published = sum(row["publish_seconds"] for row in rows)
    return {
        "adapters": count,
        "steps": len(rows),
        "wall": wall,
        "engine_seconds": dict(spent),
        "publishes": engine.copies,
        "copying_seconds": engine.copying,
        "publish_seconds": published,
        "of_training": (engine.copying + published) / training,
        "of_engine": (engine.copying + published) / sum(spent.values()),
        "engine_busy": sum(spent.values()) / wall,
    }


def publish_line(row: dict[str, Any]) -> str:
    """Return a row as a line for people."""
    each = 1e3 * row["copying_seconds"] / max(1, row["publishes"])
    return (
        f"{row['adapters']:2} adapters, {row['steps']} steps in {row['wall']:.2f} s: "
        f"{row['publishes']} publishes of {each:.2f} ms (the copy and its drop), "
        f"{row['publish_seconds'] * 1e3:.2f} ms in the sampler; "
        f"of the trainer's forwards, backwards and steps {row['of_training']:.2%}, "
        f"of all the engine did {row['of_engine']:.2%} (goal ≤ 1 %); "
        f"the engine was busy {row['engine_busy']:.0%} of the time"
    )


def measure_report(
    folder: Path, adapters: int, pages: int, threads: int, steps: int = 3, tokens: int = 24
) -> dict[str, Any]:
    """Measure the page of many steps, and what recording takes of a step.

    A real run of a few steps is recorded again by itself; then its steps, copied, make `pages`
    steps of each adapter.
    """
    load = RlLoad(sequences=64, steps=steps, tokens=tokens)
    client = AdapterClient(Host([Engine(Opening("seedling", threads=threads))]))
    try:
        path = write_run(folder / "recorded", load, adapters, threads)
        wall, cpu = train(path, client)
    finally:
        client._host.close(cancel=True)
    out = path.with_suffix("")
    counts = Counts()
    counted(out, counts)
    names = [entry["name"] for entry in (load.entry(n, 1) for n in range(adapters))]
    recorded = [
        read_step(out / name / "rollouts", step)
        for name in names
        for step in range(1, load.steps + 1)
    ]
    recording, size = record(folder / "again", recorded)
    seconds, bytes_of_page = _page(folder / "page", names, recorded, pages)
    row = {
        "adapters": adapters,
        "steps": load.steps,
        "sampled": counts.sampled,
        "recording_ms_a_step": 1e3 * recording / len(recorded),
        "bytes_a_step": size / len(recorded),
        "recording_of_cpu": recording / cpu,
        "run_cpu": cpu,
        "run_wall": wall,
        "page_steps": pages,
        "page_seconds": seconds,
        "page_bytes": bytes_of_page,
    }
    print(report_line(row), flush=True)
    return row


def record(folder: Path, steps: Sequence[Sequence[dict[str, Any]]]) -> tuple[float, int]:
    """Record steps as a run does; return the processor's seconds, and the bytes of the files."""
    written = RolloutRecord(folder, None, 0)
    groups = [
        (number, [(SampleGroup.of_json(row), row["advantages"]) for row in rows])
        for number, rows in enumerate(steps, 1)
    ]
    began = time.process_time()
    for number, rows in groups:
        of_step = [(replace(group, step=number), advantages) for group, advantages in rows]
        for group, _ in of_step:
            written.add(group)
        written.write_step(number, [g.to_json() | {"advantages": a} for g, a in of_step])
    # Once, at the end of a run, or with each training state.
    written.cover(len(steps))
    seconds = time.process_time() - began
    written.close()
    return seconds, sum(path.stat().st_size for path in folder.glob("step-*"))


def _page(
    folder: Path, names: Sequence[str], steps: Sequence[list[dict[str, Any]]], pages: int
) -> tuple[float, int]:
    """Write the page of a run of copied steps; return its seconds and bytes."""
    paths = sampled_run.write_run(folder, names, pages)
    for number, name in enumerate(names):
        for step in range(1, pages + 1):
            copied = steps[(number + step) % len(steps)]
            groups = [{**group, "step": step, "version": max(0, step - 2)} for group in copied]
            sampled_run.write_step(paths.adapter(name).rollouts, step, groups)
    began = time.perf_counter()
    write_report(RunPaths(folder), dict.fromkeys(names, sampled_run.COLUMNS))
    return time.perf_counter() - began, paths.report.stat().st_size


def report_line(row: dict[str, Any]) -> str:
    """Return the figures for people."""
    return (
        f"recording: {row['recording_ms_a_step']:.1f} ms of the processor and "
        f"{row['bytes_a_step'] / 1e3:.0f} kB for a step of 64 sequences, "
        f"{row['recording_of_cpu']:.2%} of the run's {row['run_cpu']:.1f} s (goal < 3 %)\n"
        f"report.html of {row['adapters']} adapters × {row['page_steps']} steps: "
        f"{row['page_seconds']:.1f} s, {row['page_bytes'] / 1e6:.2f} MB (goal ≤ 5 MB)"
    )
