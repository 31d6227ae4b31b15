"""This benchmark compares eight runs of reinforcement learning at once with one at a time.

    python -m benchmarks.rl [--rounds 5] [--loads 64,8,2,8+fixed,8+lognormal] [--steps 6]
                            [--processes] [--replicas] [--out benchmarks/results/NAME]
    python -m benchmarks.rl --publish      what publishing to the embedded sampler takes
    python -m benchmarks.rl --report       what report.html takes, and recording in a step

On seedling, r=8, 24 tokens, a reward for digits; a load is sequences a step. With `fixed` or
`lognormal` the reward of each sample waits 0.5 s (in the mean): a stand-in for sandboxes and
judges. `at once` is one run file with all adapters; `one at a time` is a run file for each, one
after another. Each arm has its own process, in which the base is open before the clock runs, and
the same threads. Each is measured with lag 0 and lag 1, and the speed-up is that of the better lag
of both. All tokens count. The arms take turns; medians (10–90 %) of wall, and of the processor's
seconds of all threads and processes.

`--processes` adds a process for each adapter, all at once, with the memory of each arm on its own;
`--replicas` adds one run with two engines. NAME.json and NAME.md are written.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.multi_tenant import machine, ratio
from benchmarks.rl_arms import (
    Arm,
    RlLoad,
    Round,
    bench,
    interleaved_rounds,
    label,
    plain,
)
from benchmarks.rl_overheads import measure_publish, measure_report

LOADS = "64,8,2,8+fixed,8+lognormal"
WAIT, SPREAD = 0.5, 1.0
# Speed-up on two cores, by load; the prototype had 1.17, 2.16, 2.58 and, with a fixed wait, 5.4.
GOALS = {"64": 1.1, "8": 2.0, "2": 2.4, "8+fixed": 4.0, "8+lognormal": 4.0}
TOGETHER, ALONE = "at once", "one at a time"


def load_of(text: str, steps: int, tokens: int) -> RlLoad:
    """Return the load that an argument names: sequences, `+fixed` or `+lognormal`."""
    sequences, _, waits = text.partition("+")
    if waits not in ("", "fixed", "lognormal"):
        raise SystemExit(f"{text!r} is no load; write e.g. {LOADS}")
    return RlLoad(
        sequences=int(sequences),
        steps=steps,
        wait=WAIT if waits else 0.0,
        spread=SPREAD if waits == "lognormal" else 0.0,
        tokens=tokens,
    )


def arms_of(lags: Sequence[int], adapters: int, *, processes: bool, replicas: bool) -> list[Arm]:
    """Return the arms that are asked for."""
    found: list[Arm] = []
    for lag in lags:
        found += [Arm(TOGETHER, lag, adapters), Arm(ALONE, lag, 1)]
        if processes:
            found.append(Arm("processes", lag, 1, processes=adapters))
        if replicas:
            found.append(Arm("replicas", lag, adapters, mesh="replicas=2"))
    return found


def better(rounds: dict[str, list[Round]], arms: Sequence[Arm], name: str) -> Arm:
    """Return the arm of a name whose lag takes the least wall time, by its median."""
    of_name = [arm for arm in arms if arm.name == name]
    return min(of_name, key=lambda arm: statistics.median(r.wall for r in rounds[label(arm)]))


def row_of(text: str, load: RlLoad, rounds: dict[str, list[Round]], arms: list[Arm]) -> Any:
    """Return a row of the table."""
    walls = {name: [one.wall for one in found] for name, found in rounds.items()}
    cpus = {name: [one.cpu for one in found] for name, found in rounds.items()}
    names = list(dict.fromkeys(arm.name for arm in arms))
    best = {name: better(rounds, arms, name) for name in names}
    alone = label(best[ALONE])
    last = rounds[alone][-1]
    by_lag = {
        lag: [rounds[label(a)] for a in arms if a.lag == lag] for lag in {a.lag for a in arms}
    }
    return {
        "load": text,
        "name": load.name,
        "goal": GOALS.get(text),
        "better_lag": {name: arm.lag for name, arm in best.items()},
        "wall": {name: statistics.median(found) for name, found in walls.items()},
        "cpu": {name: statistics.median(found) for name, found in cpus.items()},
        "speedup": {n: ratio(walls, alone, label(a)) for n, a in best.items() if n != ALONE},
        "speedup_cpu": {n: ratio(cpus, alone, label(a)) for n, a in best.items() if n != ALONE},
        "alone_outside_of_steps": 1 - last.in_steps / last.wall,
        # What an adapter gets does not depend on its neighbours, so the tokens are the same.
        "same_tokens": all(
            one.counts == found[0][0].counts
            for found in by_lag.values()
            for rounds_of_arm in found
            for one in rounds_of_arm
        ),
        "rounds": plain(rounds),
    }


def show(row: dict[str, Any]) -> str:
    """Return a row as a line for people."""
    parts = [f"{row['name']:18}"]
    for name, lag in row["better_lag"].items():
        own = f"{name}, lag {lag}"
        counts = row["rounds"][own][-1]["counts"]
        parts.append(
            f"{own}: {row['wall'][own]:.2f} s, CPU {row['cpu'][own]:.2f} s, "
            f"{counts['sampled']:,} tokens sampled, {counts['read']:,} read, "
            f"{counts['silent']} of {counts['groups']} groups silent"
        )
        if name in row["speedup"]:
            goal = row["goal"] if name == TOGETHER else None
            parts[-1] += (
                f"; speed-up {_spread(row['speedup'][name], goal)}, "
                f"of CPU {_spread(row['speedup_cpu'][name])}"
            )
    others = {own: f"{wall:.2f}" for own, wall in row["wall"].items()}
    parts.append("all: " + ", ".join(f"{own} {wall} s" for own, wall in others.items()))
    parts.append(f"one at a time outside of steps {row['alone_outside_of_steps']:.0%}")
    if not row["same_tokens"]:
        parts.append("WITH ONE LAG THE ARMS HAVE OTHER TOKENS")
    return "\n    ".join(parts)


def _spread(found: Sequence[float], goal: float | None = None) -> str:
    wanted = "" if goal is None else f", goal ≥ {goal:.1f}"
    return f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f}{wanted})"


def measure_table(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all loads; then, with `--processes`, the memory of each arm on its own."""
    lags = [int(lag) for lag in options.lags.split(",")]
    arms = arms_of(lags, options.adapters, processes=options.processes, replicas=options.replicas)
    report: dict[str, Any] = {"rows": []}
    with bench(folder, arms, options.adapters, options.threads) as opened:
        for text in options.loads.split(","):
            load = load_of(text, options.steps, options.tokens)
            before = os.getloadavg()
            rounds = interleaved_rounds(opened, arms, load, options.rounds)
            row = row_of(text, load, rounds, arms) | {"machine_load": before}
            report["rows"].append(row)
            print(show(row), flush=True)
    if options.processes:
        report["memory"] = measure_memory(options, folder, arms)
    return report


def measure_memory(
    options: argparse.Namespace, folder: Path, arms: Sequence[Arm]
) -> dict[str, dict[str, int]]:
    """Return each arm's memory after the first load, with no other arm's process there."""
    load = load_of(options.loads.split(",")[0], options.steps, options.tokens)
    found: dict[str, dict[str, int]] = {}
    for arm in arms:
        if arm.name not in found:
            with bench(folder / "memory", [arm], options.adapters, options.threads) as opened:
                opened.round(arm, load)
                found[arm.name] = opened.memory(arm)
            print(memory_line(arm.name, found[arm.name]), flush=True)
    return found


def memory_line(name: str, found: dict[str, int]) -> str:
    """Return an arm's memory as a line for people."""
    return (
        f"memory of {name}: {found['processes']} runs' processes, peak RSS "
        f"{found['peak_rss'] / 2**20:,.0f} MiB, PSS {found['pss'] / 2**20:,.0f} MiB"
    )


def text(report: dict[str, Any]) -> str:
    """Write the table for people."""
    about = report["machine"]
    load = ", ".join(f"{one:.1f}" for one in report["load_before"])
    lines = [
        "# Reinforcement learning of many adapters at once",
        "",
        f"{about['cores']} cores of {about['cpu']}, torch {about['torch']}, Python "
        f"{about['python']}, {about['threads']} thread(s) each; load average before {load}. "
        f"seedling, r=8, {report['tokens']} tokens, {report['adapters']} adapters of "
        f"{report['steps']} steps; medians of {report['rounds']} rounds, speed-ups with 10–90 %, "
        "each arm with its better lag. Waiting rewards stand in for sandboxes and judges.",
        "",
        "| sequences a step, reward | arm | lag | wall s | CPU s | tokens | speed-up | of CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        for name, lag in row["better_lag"].items():
            own = f"{name}, lag {lag}"
            gains = [
                _spread(row[k][name]) if name in row[k] else "1" for k in ("speedup", "speedup_cpu")
            ]
            lines.append(
                f"| {row['name']} | {name} | {lag} | {row['wall'][own]:.2f} | "
                f"{row['cpu'][own]:.2f} | {row['rounds'][own][-1]['counts']['sampled']:,} | "
                f"{gains[0]} | {gains[1]} |"
            )
    memory = [f"- {memory_line(*one)}" for one in report.get("memory", {}).items()]
    return "\n".join([*lines, "", *memory]).rstrip() + "\n"


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", default=LOADS, help="sequences a step, of the table")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of each adapter")
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--lags", default="0,1", help="that each arm is measured with")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--processes", action="store_true", help="a process for each adapter, too")
    parser.add_argument("--replicas", action="store_true", help="one run with replicas=2, too")
    parser.add_argument("--publish", action="store_true", help="in place of the table")
    parser.add_argument("--report", action="store_true", help="in place of the table")
    parser.add_argument("--counts", default="1,8,32", help="adapters with --publish")
    parser.add_argument("--pages", type=int, default=500, help="steps of the page with --report")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is asked for, print it, and write it down."""
    options = parsed(arguments)
    report: dict[str, Any] = {
        "machine": machine() | {"threads": options.threads, "cores": os.cpu_count()},
        "load_before": os.getloadavg(),
        **{name: getattr(options, name) for name in ("rounds", "adapters", "steps", "tokens")},
    }
    print(json.dumps(report), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.publish:
            counts = [int(count) for count in options.counts.split(",")]
            report["publish"] = measure_publish(folder, counts, options.steps, options.threads)
        if options.report:
            report["report"] = measure_report(
                folder, options.adapters, options.pages, options.threads
            )
        if not options.publish and not options.report:
            report |= measure_table(options, folder)
    report["load_after"] = os.getloadavg()
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        if "rows" in report:
            options.out.with_suffix(".md").write_text(text(report))
    return report


if __name__ == "__main__":
    main()
