"""Groups that were sampled and scored are on disk at once, so none is sampled or paid twice.

`rollouts/pending.jsonl` has those that no training state covers yet, in the order in which they
came; `rollouts/step-N.jsonl.gz` has the groups that step N was trained on, in their own order.
"""

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from manylora.config import KeepRollouts
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.run_folder import write_text

PENDING = "pending.jsonl"
# As `SampleGroup.to_json` begins.
_STEP = re.compile(rb'\{"step": (\d+),')


class RolloutRecord:
    """A `RolloutRecord` holds the groups of one adapter's run.

    Attributes:
        found: groups of an earlier attempt, by step and number, that may be used again.
    """

    def __init__(self, folder: Path, keep: KeepRollouts | None, step: int):
        """Read what an earlier attempt has left.

        Args:
            keep: which steps' files stay; None = all.
            step: the steps that are behind the adapter.
        """
        self._folder, self._keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        groups = (SampleGroup.of_json(plain) for plain in _lines(folder / PENDING))
        self.found = {(g.step, g.number): g for g in groups if g.step > step}
        self._rewrite(self.found.values())
        self._file: IO[str] = (folder / PENDING).open("a", encoding="utf-8")

    def add(self, group: SampleGroup) -> None:
        """Write a group that is complete."""
        self._file.write(json.dumps(group.to_json()) + "\n")
        self._file.flush()

    def write_step(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Write what a step was trained on; the bytes depend on that alone."""
        text = "".join(json.dumps(group) + "\n" for group in groups)
        path = self.path(step)
        partial = path.with_name(f".{path.name}.tmp")
        with partial.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            file.write(text.encode("ascii"))
        partial.replace(path)
        self._drop_old(step)

    def path(self, step: int) -> Path:
        """Return where the groups of a step lie."""
        return self._folder / f"step-{step}.jsonl.gz"

    def cover(self, step: int) -> None:
        """Forget the pending groups up to a step, which a training state covers now."""
        self._file.close()
        path = self._folder / PENDING
        kept = b"".join(line for line in _raw_lines(path) if _step_of(line) > step)
        write_text(path, kept.decode("utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Write nothing any more."""
        self._file.close()

    def _rewrite(self, groups: Iterable[SampleGroup]) -> None:
        text = "".join(json.dumps(group.to_json()) + "\n" for group in groups)
        write_text(self._folder / PENDING, text)

    def _drop_old(self, step: int) -> None:
        keep = self._keep
        if keep is None:
            return
        old = step if keep.every is not None else step - (keep.newest or 1)
        if keep.every is not None and step % keep.every == 0:
            return
        self.path(old).unlink(missing_ok=True)


def read_step(folder: Path, step: int) -> list[dict[str, Any]]:
    """Return the groups of a step as they were written; empty if they are not there."""
    path = folder / f"step-{step}.jsonl.gz"
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _step_of(line: bytes) -> int:
    """Return the step of a group by how its line begins, since the rest may be long; 0 of a torn
    line."""
    found = _STEP.match(line)
    return int(found[1]) if found else 0


def _raw_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file; a torn one, and what follows it, is left out."""
    rows: list[dict[str, Any]] = []
    for line in _raw_lines(path):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows
