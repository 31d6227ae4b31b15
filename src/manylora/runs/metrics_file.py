"""metrics.jsonl has one line a step, which is on disk before the checkpoint that covers it."""

import json
import os
from pathlib import Path
from typing import Any, Self

from manylora.runs.events import StepDone
from manylora.runs.run_folder import write_text


class MetricsFile:
    """A `MetricsFile` appends one JSON line a step; each is handed to the system at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: StepDone) -> None:
        """Write one line."""
        self._file.write(json.dumps(step.row()) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the lines are on the disk itself."""
        if self._file.closed:  # closing has waited already
            return
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.sync()
        finally:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file; a torn one, and what follows it, is left out."""
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return rows
    for line in lines:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines of steps 1 to `step` and return their rows; drop what was logged after the
    checkpoint."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        unchanged = path.read_text(encoding="utf-8") == text
    except (FileNotFoundError, UnicodeDecodeError):
        unchanged = not text and not path.exists()
    if not unchanged:
        write_text(path, text)
    return rows
