"""A run's files have their places, and are written so that none is ever half there."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.types import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs into one folder are not noticed there
    fcntl = None


@dataclass(frozen=True, slots=True)
class AdapterPaths:
    """`AdapterPaths` are the files of one adapter, all below `OUT/<adapter>/`."""

    root: Path

    @property
    def metrics(self) -> Path:
        """This file has one JSON line a step."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """This folder holds training states, one folder `step-N` each."""
        return self.root / "checkpoints"

    @property
    def final(self) -> Path:
        """The finished adapter is this PEFT folder."""
        return self.root / "final"

    @property
    def samples(self) -> Path:
        """This file holds greedy answers to evaluation prompts, before and after."""
        return self.root / "samples.json"

    @property
    def result(self) -> Path:
        """This is the adapter's part of the summary; `completed` means: never train it again."""
        return self.root / "result.json"

    @property
    def user_log(self) -> Path:
        """What functions of users print is here."""
        return self.root / "user.log"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files are here."""
        return self.root / "tensorboard"

    def state(self, step: int) -> Path:
        """Return the folder of the training state after `step` steps."""
        return self.checkpoints / f"step-{step}"

    def delete(self) -> None:
        """Delete what a run wrote here, and nothing else."""
        for file in (self.metrics, self.samples, self.result, self.user_log):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.final, self.tensorboard):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
        if self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()


@dataclass(frozen=True, slots=True)
class RunPaths:
    """`RunPaths` are the files of a whole run, all below OUT."""

    root: Path

    @property
    def run_yaml(self) -> Path:
        """This is the resolved run file: every default is written out."""
        return self.root / "run.yaml"

    @property
    def inputs(self) -> Path:
        """This file has the SHA-256 of every data file, and of every file of code, per adapter."""
        return self.root / "inputs.json"

    @property
    def summary(self) -> Path:
        """This file says how each adapter ended."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """This is the page for people."""
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """This file is held while a process trains into this folder."""
        return self.root / ".lock"

    def adapter(self, name: str) -> AdapterPaths:
        """Return the files of one adapter."""
        return AdapterPaths(self.root / name)

    def delete(self, adapters: list[str]) -> None:
        """Delete what a run with these adapters wrote here, and nothing else."""
        for name in adapters:
            self.adapter(name).delete()
        # run.yaml last: while it is there, an interrupted deletion is still known as ours.
        for file in (self.report, self.summary, self.inputs, self.run_yaml):
            file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file, so that a reader or a crash sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value as `write_text` does; NaN and infinities are refused, not written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; None when it is missing or cannot be read as JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def is_completed(paths: AdapterPaths) -> bool:
    """Return whether nothing is left to do for this adapter."""
    result = read_json(paths.result)
    done = isinstance(result, dict) and result.get("status") == "completed"
    return done and paths.final.is_dir()


@contextmanager
def held(paths: RunPaths) -> Iterator[None]:
    """Hold the output folder; a second process that wants it is refused.

    The lock belongs to the process, so a killed one leaves nothing to clean up.
    """
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        file = paths.lock.open("a")
    except OSError as error:
        raise ConfigError(f"output folder {paths.root}: {error.strerror or error}") from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"another process is training into {paths.root}; "
                    "wait for it, or choose another output folder"
                ) from error
        try:
            yield
        finally:
            paths.lock.unlink(missing_ok=True)
