"""The arms of `benchmarks.rl` train the same adapters in several ways, by run files.

Each arm has processes of its own, each with a base that is open before the clock runs.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from manylora.runs.metrics_file import read_metrics
from manylora.runs.rl.rollout_record import read_step
from tests.family import below

# Waits by what was sampled, so that a sample waits as long in every arm that samples it.
REWARDS = """
import math, random, time

def digits(completions, completion_ids, wait=0.0, spread=0.0):
    if wait:
        time.sleep(max(_seconds(ids, wait, spread) for ids in completion_ids))
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def _seconds(ids, mean, spread):
    drawn = random.Random(f"7 {ids}").gauss(0.0, spread) if spread else 0.0
    return mean * math.exp(drawn - spread * spread / 2)
"""
WORDS = ("river", "stone", "apple", "cloud", "tiger", "paper", "lemon", "chair", "green", "music")
# Between two looks at the processor's time of a process; the kernel counts so many a second.
TICKS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RlLoad:
    """An `RlLoad` is what each adapter does.

    Attributes:
        sequences: of a step: groups of 8, or one group if there are fewer.
        steps: of each adapter.
        wait: seconds that the reward of a sample waits in the mean, as a sandbox or a judge would.
        spread: of the logarithm of the wait (log-normal); 0 = all wait the same.
        tokens: longest answer.
    """

    sequences: int
    steps: int = 6
    wait: float = 0.0
    spread: float = 0.0
    tokens: int = 24

    @property
    def name(self) -> str:
        """The load as people read it."""
        if not self.wait:
            return f"{self.sequences}, no latency"
        kind = "log-normal" if self.spread else "fixed"
        return f"{self.sequences}, {self.wait:g} s {kind}"

    def entry(self, number: int, lag: int) -> dict[str, Any]:
        """Return one adapter of a run file; each has a seed of its own."""
        args = {"wait": self.wait, "spread": self.spread}
        size = min(8, self.sequences)
        return {
            "name": f"digits{number}",
            "lora": {"rank": 8, "alpha": 16},
            "optimizer": {"lr": 5e-3, "schedule": "constant"},
            "save_every": 0,
            "seed": number,
            "rl": {
                "prompts": "words.jsonl",
                "reward": [{"use": "rewards.py:digits", "args": args}],
                "groups": self.sequences // size,
                "group_size": size,
                "max_steps": self.steps,
                "sampling": {"max_tokens": self.tokens},
                "off_policy": {"lag": lag},
            },
        }


@dataclass(frozen=True, slots=True)
class Arm:
    """An `Arm` is one way to train the adapters.

    Attributes:
        processes: between which the adapters are dealt out, working at the same time.
        at_once: adapters of one run file; a process trains its run files one after another.
        mesh: of each process.
        lag: see `docs/rl.md`.
    """

    name: str
    lag: int
    at_once: int
    processes: int = 1
    mesh: str = "dp=1,tp=1"

    def files(self, folder: Path, load: RlLoad, adapters: int, threads: int) -> list[list[Path]]:
        """Write the run files of each process."""
        numbers = list(range(adapters))
        runs = [numbers[at : at + self.at_once] for at in range(0, adapters, self.at_once)]
        written = []
        for one in runs:
            entries = [load.entry(number, self.lag) for number in one]
            written.append(write_run_file(folder, f"run{one[0]}", entries, threads, self.mesh))
        return [written[process :: self.processes] for process in range(self.processes)]


def write_run_file(
    folder: Path,
    name: str,
    entries: Sequence[dict[str, Any]],
    threads: int,
    mesh: str = "dp=1,tp=1",
) -> Path:
    """Write a run file with everything beside it, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    rows = (json.dumps({"prompt": f"{word}: "}) + "\n" for word in WORDS)
    (folder / "words.jsonl").write_text("".join(rows))
    run = {
        "base": "seedling",
        "out": str(folder / name),
        "threads": threads,
        "mesh": mesh,
        "tensorboard": False,
        "report": False,
        "adapters": list(entries),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@dataclass(slots=True)
class Counts:
    """`Counts` are what was computed, over all adapters and steps.

    Attributes:
        sampled: tokens that were drawn, as they lie in the rollouts' files.
        read: positions that were read in training.
        trained: tokens with an advantage.
        groups, silent: groups, and those without a difference in rewards, which cost no backward.
    """

    sampled: int = 0
    read: int = 0
    trained: int = 0
    groups: int = 0
    silent: int = 0


@dataclass(slots=True)
class Round:
    """A `Round` is one arm's work once.

    Attributes:
        wall: seconds from the order until the last process is done.
        cpu: seconds of all its processes, the engine's included.
        in_steps: of the wall, seconds that steps waited, forwarded and went backward, summed over
            adapters: with one at a time what is left is the runs' beginnings and ends.
    """

    wall: float
    cpu: float
    in_steps: float
    counts: Counts


def counted(out: Path, counts: Counts) -> float:
    """Count what a run has left in its folder; return the seconds of its steps."""
    seconds = 0.0
    for metrics in sorted(out.glob("*/metrics.jsonl")):
        for row in read_metrics(metrics):
            groups = read_step(metrics.parent / "rollouts", row["step"])
            counts.sampled += sum(
                len(segment["sampled"])
                for group in groups
                for rollout in group["rollouts"]
                for segment in rollout["segments"]
            )
            counts.read += row["tokens"]
            counts.trained += row["trained_tokens"]
            counts.groups += row["groups"]
            counts.silent += row["zero_variance_groups"]
            parts = ("waiting_seconds", "forward_seconds", "backward_seconds")
            seconds += sum(row[part] for part in parts)
    return seconds


class RunProcess:
    """A `RunProcess` has a base open, and trains run files when it is told to."""

    def __init__(self, first: Path, log: Path):
        """Start it; `opened` waits for the base, which is that of the run file `first`."""
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.rl_process", str(first)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def opened(self) -> Self:
        """Wait until the base is open."""
        self._answer()
        return self

    def begin(self, files: Sequence[Path]) -> None:
        """Have run files trained, one after another."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(file) for file in files]) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Wait until they are trained. Raises RuntimeError if one of them was not."""
        codes = self._answer()
        if any(codes):
            raise RuntimeError(f"exit codes {codes}\n{self._log.read_text()[-3000:]}")

    def cpu(self) -> float:
        """Return the processor's seconds of it and of its engine's processes until now."""
        return sum(_cpu(pid) for pid in self._family())

    def memory(self) -> dict[str, int]:
        """Return bytes: the sum of peak RSS, and PSS, in which a shared page counts once."""
        return {
            "peak_rss": sum(_kilobytes(pid, "status", "VmHWM") for pid in self._family()) * 1024,
            "pss": sum(_kilobytes(pid, "smaps_rollup", "Pss") for pid in self._family()) * 1024,
        }

    def close(self) -> None:
        """Close the base; what it still trains is given up after a minute."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process has ended\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def _family(self) -> list[int]:
        return [self._process.pid, *below(self._process.pid)]


class Bench:
    """A `Bench` has the processes of arms; those of arms that differ in lag only are the same."""

    def __init__(self, folder: Path, arms: Sequence[Arm], adapters: int, threads: int):
        """Open all bases, and let each train a little."""
        self._folder, self._adapters, self._threads = folder, adapters, threads
        self._number = 0
        self._processes: dict[str, list[RunProcess]] = {}
        try:
            for arm in arms:
                if arm.name not in self._processes:
                    self._open(arm)
                    self.round(arm, RlLoad(sequences=2, steps=1))
        except BaseException:
            self.close()
            raise

    def round(self, arm: Arm, load: RlLoad) -> Round:
        """Let an arm train all adapters once."""
        self._number += 1
        folder = self._folder / f"round{self._number}"
        files = arm.files(folder, load, self._adapters, self._threads)
        processes = self._processes[arm.name]
        cpu, began = sum(one.cpu() for one in processes), time.perf_counter()
        for process, own in zip(processes, files, strict=True):
            process.begin(own)
        for process in processes:
            process.end()
        wall = time.perf_counter() - began
        cpu = sum(one.cpu() for one in processes) - cpu
        counts = Counts()
        seconds = sum(counted(file.with_suffix(""), counts) for own in files for file in own)
        shutil.rmtree(folder)
        return Round(wall, cpu, seconds, counts)

    def memory(self, arm: Arm) -> dict[str, int]:
        """Return what an arm's processes hold; see `RunProcess.memory`."""
        found = [process.memory() for process in self._processes[arm.name]]
        return {"processes": len(found)} | {name: sum(f[name] for f in found) for name in found[0]}

    def close(self) -> None:
        """Close all bases."""
        for processes in self._processes.values():
            for process in processes:
                process.close()

    def _open(self, arm: Arm) -> None:
        folder = self._folder / arm.name
        files = arm.files(folder, RlLoad(sequences=2), self._adapters, self._threads)
        opening: list[RunProcess] = []
        self._processes[arm.name] = opening
        for number, own in enumerate(files):
            opening.append(RunProcess(own[0], folder / f"errors{number}.txt"))
        for process in opening:
            process.opened()


@contextmanager
def bench(folder: Path, arms: Sequence[Arm], adapters: int, threads: int) -> Iterator[Bench]:
    """Open the arms' processes for a while."""
    opened = Bench(folder, arms, adapters, threads)
    try:
        yield opened
    finally:
        opened.close()


def interleaved_rounds(
    opened: Bench, arms: Sequence[Arm], load: RlLoad, rounds: int
) -> dict[str, list[Round]]:
    """Return each arm's rounds by `label`; the arms take turns, another one first in each."""
    found: dict[str, list[Round]] = {label(arm): [] for arm in arms}
    for number in range(rounds):
        first = number % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            found[label(arm)].append(opened.round(arm, load))
    return found


def label(arm: Arm) -> str:
    """Return an arm's name with its lag."""
    return f"{arm.name}, lag {arm.lag}"


def plain(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """Return rounds as JSON has them."""
    return {name: [asdict(one) for one in found] for name, found in rounds.items()}


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _kilobytes(pid: int, file: str, name: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
