"""Metrics go to TensorBoard, Weights & Biases and Trackio besides metrics.jsonl.

A tracker is a listener; if it fails in the middle of a run, the run goes on without it.
"""

import importlib
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any, Protocol

from manylora.config import RunFile
from manylora.runs.columns import CourseColumns
from manylora.runs.events import AdapterEnded, AdapterStarted, EvalDone, Event, RunStarted, StepDone
from manylora.runs.run_folder import RunPaths
from manylora.types import ConfigError


class Tracker(Protocol):
    """A `Tracker` is a listener that has something to close."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None:
        """Hand over everything; called once, however the run ends."""


def open_trackers(run: RunFile, paths: RunPaths) -> list[Tracker]:
    """Open the trackers that the run file asks for. Raises ConfigError if a package that one of
    them needs is not installed."""
    trackers: list[Tracker] = []
    if run.tensorboard:
        trackers.append(TensorBoard(paths))
    if run.wandb is not None:
        settings = {
            "project": run.wandb.project,
            "entity": run.wandb.entity,
            "group": run.out.name,
            "reinit": "create_new",  # several runs at once, none of them "the current one"
        }
        trackers.append(RunPerAdapter(_package("wandb"), settings, run))
    if run.trackio is not None:
        settings = {"project": run.trackio.project}
        trackers.append(RunPerAdapter(_package("trackio"), settings, run))
    return trackers


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the run file asks for {name}, which is not installed; "
            f"install it with: pip install 'manylora[{name}]'"
        ) from error


def scalars(event: StepDone | EvalDone, columns: CourseColumns) -> dict[str, float]:
    """Return the figures of an event by the names that trackers show."""
    figures = event.figures
    if isinstance(event, EvalDone):
        found = {f"eval/{one.name}": figures[one.name] for one in columns.evaluation if one.tracked}
        return {name: value for name, value in found.items() if value is not None}
    # A step may have figures that nobody knew of before, such as those of a user's own code.
    hidden = {one.name for one in columns.step if not one.tracked}
    train = {
        f"train/{name}": float(value)
        for name, value in figures.items()
        if name not in hidden and value is not None
    }
    speed = figures["tokens"] / event.seconds if event.seconds else 0.0
    return {**train, "train/tokens_per_second": speed}


class TensorBoard:
    """`TensorBoard` writes event files in adapters' folders, for `tensorboard --logdir OUT`."""

    def __init__(self, paths: RunPaths) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard is not installed; install it with: pip install tensorboard, "
                "or write tensorboard: false in the run file"
            ) from error
        self._make, self._paths = SummaryWriter, paths
        self._writers: dict[str, Any] = {}
        self._columns: Mapping[str, CourseColumns] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._columns = event.columns
        elif isinstance(event, AdapterStarted):
            folder = self._paths.adapter(event.adapter).tensorboard
            # The viewer is to forget what an earlier attempt logged after the checkpoint.
            purge = event.step + 1 if event.step else 0
            self._writers[event.adapter] = self._make(str(folder), purge_step=purge, flush_secs=10)
        elif isinstance(event, StepDone | EvalDone) and event.adapter in self._writers:
            for name, value in scalars(event, self._columns[event.adapter]).items():
                self._writers[event.adapter].add_scalar(name, value, event.step)
        elif isinstance(event, AdapterEnded) and event.adapter in self._writers:
            self._writers.pop(event.adapter).close()

    def close(self) -> None:
        """Close what is still open."""
        while self._writers:
            self._writers.popitem()[1].close()


class RunPerAdapter:
    """A `RunPerAdapter` opens a run per adapter with Weights & Biases or Trackio, of one interface.

    Metrics go through the run object that `init` returns, never through the package's idea of the
    one current run, because several are open at once.
    """

    def __init__(self, package: Any, settings: dict[str, Any], run: RunFile) -> None:
        self._package, self._settings = package, settings
        self._configs = {entry.name: entry.model_dump(mode="json") for entry in run.adapters}
        self._runs: dict[str, Any] = {}
        self._columns: Mapping[str, CourseColumns] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._columns = event.columns
        elif isinstance(event, AdapterStarted):
            # They greet on stdout, which may be for machines.
            with redirect_stdout(sys.stderr):
                self._runs[event.adapter] = self._package.init(
                    name=event.adapter, config=self._configs.get(event.adapter), **self._settings
                )
        elif isinstance(event, StepDone | EvalDone) and event.adapter in self._runs:
            figures = scalars(event, self._columns[event.adapter])
            self._runs[event.adapter].log(figures, step=event.step)
        elif isinstance(event, AdapterEnded) and event.adapter in self._runs:
            self._finish(event.adapter)

    def close(self) -> None:
        """Finish what is still open."""
        for name in list(self._runs):
            self._finish(name)

    def _finish(self, name: str) -> None:
        with redirect_stdout(sys.stderr):
            self._runs.pop(name).finish()
