"""An adapter's training states are asked for while its steps go on, and only some of them stay."""

import asyncio
import logging
import re
import shutil
from asyncio import wrap_future
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.runs.columns import CourseColumns
from manylora.runs.events import CheckpointSaved, Listener
from manylora.runs.run_folder import AdapterPaths

log = logging.getLogger(__name__)

_STATE = re.compile(r"step-(\d+)")


@dataclass(slots=True)
class _Saving:
    """A `_Saving` is a training state that has been asked for."""

    step: int
    path: Path
    evaluations: Sequence[Mapping[str, Any]]
    future: asyncio.Future[Path]


class States:
    """`States` are the training states of one adapter."""

    def __init__(
        self,
        name: str,
        paths: AdapterPaths,
        keep: int | None,
        columns: CourseColumns,
        emit: Listener,
    ) -> None:
        """Begin without a state; the `keep` newest ones stay, None = all."""
        # Of the newest one that is whole.
        self.saved_step = 0
        self._name, self._paths, self._keep, self._emit = name, paths, keep, emit
        self._columns = columns
        self._saving: _Saving | None = None

    @property
    def is_written(self) -> bool:
        """The one that was asked for last has come to an end."""
        return self._saving is not None and self._saving.future.done()

    async def save(
        self, adapter: Any, step: int, saved: dict[str, Any], *, first: Callable[[], None]
    ) -> None:
        """Ask for a state of this step, unless it is there.

        Args:
            saved: what it holds besides the adapter; in it, `evaluations` say which is the best.
            first: called before it is asked for.
        """
        await self.written()
        if step == self.saved_step:
            return
        first()
        path = self._paths.state(step)
        future = wrap_future(adapter.save(path, saved))
        self._saving = _Saving(step, path, saved["evaluations"], future)

    async def written(self) -> None:
        """Wait for the state that was asked for last; older ones may then go. Raises SaveFailed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        await saving.future
        self.saved_step = saving.step
        self._emit(CheckpointSaved(self._name, saving.step, str(saving.path)))
        await self.drop_old(saving.evaluations)

    async def drop_old(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """See `drop_old_states`."""
        folder = self._paths.checkpoints
        await asyncio.to_thread(drop_old_states, folder, self._keep, evaluations, self._columns)


def saved_steps(folder: Path) -> list[int]:
    """Return the steps whose training states lie in `folder`, in order."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _STATE.fullmatch(name)))


def best_step(
    steps: Sequence[int], evaluations: Sequence[Mapping[str, Any]], columns: CourseColumns
) -> int | None:
    """Return the one of these steps whose evaluation was the best (see `CourseColumns.evaluation`);
    of equals the latest. None if none was evaluated."""
    judged = [
        (columns.badness(evaluation), -evaluation["step"])
        for evaluation in evaluations
        if evaluation["step"] in steps
    ]
    return -min(judged)[1] if judged else None


def drop_old_states(
    folder: Path,
    keep: int | None,
    evaluations: Sequence[Mapping[str, Any]],
    columns: CourseColumns,
) -> list[int]:
    """Delete all training states but the `keep` newest ones and the best one; return those left.

    Call it once the newest one is whole. What cannot be deleted is logged and stays.
    """
    steps = saved_steps(folder)
    if keep is None:
        return steps
    staying = {*steps[-keep:], best_step(steps, evaluations, columns)}
    for step in steps:
        if step not in staying:
            try:
                shutil.rmtree(folder / f"step-{step}")
            except OSError as error:
                log.warning("an old training state stays: %s", error)
    return [step for step in steps if step in staying]
