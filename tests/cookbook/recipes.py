"""Starting a published recipe as its user would, and reading what it left behind."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.wire.server import BASE_ALIAS, CHAT_ALIAS, DEVELOPER, Server

BASE = f"model_name={BASE_ALIAS}"
CHAT = f"model_name={CHAT_ALIAS}"
FRESH = "behavior_if_log_dir_exists=raise"
CLOSED_PORT = "http://127.0.0.1:9"


@dataclass
class Workplace:
    """Where recipes run: a folder with their data, and the server that they train on."""

    folder: Path
    server: Server
    logs: Path = field(init=False)

    def __post_init__(self) -> None:
        self.logs = self.folder / "logs"
        self.logs.mkdir(exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Nothing but the server's address and a key says that this is not the vendor's service."""
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        return {
            **kept,
            "TINKER_BASE_URL": self.server.url,
            "TINKER_API_KEY": DEVELOPER,
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hf"),
            "HOME": str(self.folder),
            "TINKER_COOKBOOK_RUNS_DIR": str(self.folder / "runs"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            # Two of the training loops fetch a price list; a test reaches nothing but the server.
            "HTTPS_PROXY": CLOSED_PORT,
            "HTTP_PROXY": CLOSED_PORT,
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, recipe: str, name: str, *options: str, seconds: float = 120.0) -> "Log":
        """Run `python -m tinker_cookbook.recipes.<recipe> <options>` to its end."""
        log = self.log(name)
        self.run_bare(recipe, name, f"log_path={log.folder}", *options, seconds=seconds)
        return log

    def run_bare(
        self, recipe: str, name: str, *options: str, typed: str = "", seconds: float = 120.0
    ) -> str:
        """Run a recipe that has no option `log_path`; returns what it and those before printed."""
        log = self.log(name)
        with log.output.open("a") as out:
            done = subprocess.run(
                _command(recipe, options),
                cwd=self.folder,
                env=self.environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                input=typed.encode(),
                timeout=seconds,
                check=False,
            )
        assert done.returncode == 0, log.tail()
        return log.output.read_text(errors="replace")

    def run_and_kill(
        self,
        recipe: str,
        name: str,
        *options: str,
        when: Callable[["Log"], bool],
        seconds: float = 120.0,
    ) -> "Log":
        """Start a recipe and kill it (-9) as soon as `when` says so."""
        log = self.log(name)
        with log.output.open("a") as out:
            process = subprocess.Popen(
                _command(recipe, (f"log_path={log.folder}", *options)),
                cwd=self.folder,
                env=self.environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            end = time.monotonic() + seconds
            while not when(log):
                assert process.poll() is None, f"it ended too early\n{log.tail()}"
                assert time.monotonic() < end, log.tail()
                time.sleep(0.01)
            process.kill()
            process.wait()
        return log

    def log(self, name: str) -> "Log":
        return Log(self.logs / name, self.folder / f"{name}.out")

    def stage(self, *folders: str) -> "Log":
        """What a recipe wrote into a folder of its own choice, below that of all runs."""
        return Log(self.folder.joinpath("runs", *folders), self.folder / "no-output")


@dataclass(frozen=True)
class Log:
    """What a recipe wrote."""

    folder: Path
    output: Path

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return _rows(self.folder / "metrics.jsonl")

    def series(self, name: str) -> list[float]:
        """One metric, from the first step that has it to the last."""
        values = [row[name] for row in self.metrics() if name in row]
        assert values, f"{name} is not among {sorted({k for row in self.metrics() for k in row})}"
        return values

    def checkpoints(self) -> list[dict[str, Any]]:
        """The lines of checkpoints.jsonl."""
        return _rows(self.folder / "checkpoints.jsonl")

    def tail(self, lines: int = 40) -> str:
        return "".join(self.output.read_text(errors="replace").splitlines(keepends=True)[-lines:])


def rises(values: list[float], share: int = 3) -> float:
    """How much the mean of the last third is above that of the first."""
    count = max(1, len(values) // share)
    return sum(values[-count:]) / count - sum(values[:count]) / count


def finished(log: Log, *kinds: str) -> None:
    """The last checkpoint is the final one, and all that was measured is a number."""
    last = log.checkpoints()[-1]
    assert last["name"] == "final"
    for kind in kinds or ("state_path", "sampler_path"):
        assert last[kind].startswith("tinker://"), kind
    for row in log.metrics():
        for name, value in row.items():
            assert not isinstance(value, float) or math.isfinite(value), (name, value)


def _command(recipe: str, options: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe}", *options]


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
