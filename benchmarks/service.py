"""This benchmark measures the service: latencies, idle pollers, memory, throughput, journal.

    python -m benchmarks.service [--rounds 5] [--requests 20000] [--only latency,throughput,…]
                                 [--out benchmarks/results/NAME]

Servers run seedling, clients run on the same machine, and arms take turns. Times need a quiet
machine: the report names the load before and after. NAME.json and NAME.md are written.
"""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.multi_tenant import machine
from benchmarks.service_journal import journal_cost
from benchmarks.service_load import latencies, memory, throughput
from tests.wire.server import Server

SHAPES = ((1, 64), (8, 64), (1, 1024))
GOALS = {
    "latency": "submit to acknowledged, which is after it was queued: median < 10 ms",
    "throughput": "eight at once ≥ 1.8 × one after another, with one engine or two",
    "memory": "flat",
    "journal": "< 3 % of a step",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--pollers", type=int, default=500)
    parser.add_argument("--only", default=",".join(GOALS))
    parser.add_argument("--threads", type=int, default=1, help="Of the server's engine.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["TINKER_TELEMETRY"] = "0"
    report: dict[str, Any] = {
        "machine": {**machine(), "cores": os.cpu_count()},
        "threads": options.threads,
        "load_before": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def throughputs() -> Any:
            own = ("--set", f"threads={options.threads}")
            with (
                Server(folder / "one", *own) as one,
                Server(folder / "two", *own, "--mesh", "replicas=2") as two,
            ):
                return throughput({"one engine": one, "two engines": two}, options.rounds, 15)

        def served(measure: Callable[[Server], Any]) -> Any:
            with Server(folder / "served", "--set", f"threads={options.threads}") as server:
                return measure(server)

        arms: dict[str, Callable[[], Any]] = {
            "latency": lambda: served(
                lambda server: asyncio.run(latencies(server, options.pollers, options.rounds))
            ),
            "throughput": throughputs,
            "journal": lambda: asyncio.run(
                journal_cost(folder / "journal", SHAPES, 3 * options.rounds, 5)
            ),
            "memory": lambda: served(lambda server: asyncio.run(memory(server, options.requests))),
        }
        for name in options.only.split(","):
            report[name] = {"load": os.getloadavg(), "figures": arms[name]()}
            print(json.dumps({name: report[name]}, indent=1), flush=True)
    report["load_after"] = os.getloadavg()
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text(report))


def text(report: dict[str, Any]) -> str:
    """Write the report for people."""
    about = report["machine"]
    lines = [
        "# The service on seedling",
        "",
        f"{about['cores']} cores of {about['cpu']}, torch {about['torch']}, Python "
        f"{about['python']}, engine on {report['threads']} thread(s); load average before "
        f"{_numbers(report['load_before'])}, after {_numbers(report['load_after'])}. "
        "Medians (10–90 %).",
    ]
    for name, goal in GOALS.items():
        if name not in report:
            continue
        entry = report[name]
        load = _numbers(entry["load"])
        lines += ["", f"## {name.capitalize()} ({goal})", "", f"Load average {load}.", ""]
        rows = entry["figures"] if isinstance(entry["figures"], list) else [entry["figures"]]
        for row in rows:
            lines += ["| | |", "|---|---|", *_rows("", row), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(prefix: str, figures: dict[str, Any]) -> list[str]:
    rows: list[str] = []
    for name, value in figures.items():
        words = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict) and "median" in value:
            rows.append(f"| {words} | {value['median']} ({value['p10']}–{value['p90']}) |")
        elif isinstance(value, dict):
            rows += _rows(f"{words}: ", value)
        else:
            rows.append(f"| {words} | {value} |")
    return rows


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


if __name__ == "__main__":
    main()
