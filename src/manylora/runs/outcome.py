"""An outcome says how an adapter ended."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from manylora.runs.columns import CourseColumns
from manylora.runs.events import Status, finite
from manylora.runs.metrics_file import read_metrics
from manylora.runs.run_folder import AdapterPaths, is_completed, read_json
from manylora.runs.stopping import EXIT_INTERRUPTED

EXIT_FAILED = 1
# Of a field that is only of use to the process that is at work.
_HERE = {"here": True}


def error_dict(error: Exception) -> dict[str, str]:
    """Return an error as files and JSON hold it."""
    return {"type": type(error).__name__, "message": str(error)}


def exit_code(statuses: Collection[str | None]) -> int:
    """Return the exit code of a run whose adapters ended so."""
    if "cancelled" in statuses:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if "failed" in statuses else 0


@dataclass(slots=True)
class Outcome:
    """An `Outcome` says how an adapter ended; it is the adapter's part of summary.json.

    Attributes:
        columns: the figures of its steps.
        steps: optimizer steps that are behind the adapter.
        total_steps: optimizer steps that were planned.
        ends: `first_NAME` and `last_NAME` of each figure whose ends are told.
        evaluations: while it trained, each with its step.
        sums: over all steps, those before a resume included.
        seconds: the device's time in batches with steps of this adapter; those before a resume
            included.
        warnings: what its owner should know.
        trained_here: tokens that this process trained (for the rate of the whole run).
        training_seconds: this adapter's share of the device's time here, in steps.
        evaluation_seconds: its share in evaluations.
        skipped: an earlier attempt had completed it.
    """

    columns: CourseColumns = field(metadata=_HERE)
    status: Status | None = None
    steps: int = 0
    total_steps: int = 0
    num_params: int = 0
    ends: dict[str, float | None] = field(init=False)
    eval_before: dict[str, Any] | None = None
    eval_after: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, int] = field(init=False)
    seconds: float = 0.0
    resumed_from: int = 0
    error: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)
    trained_here: int = field(default=0, metadata=_HERE)
    training_seconds: float = field(default=0.0, metadata=_HERE)
    evaluation_seconds: float = field(default=0.0, metadata=_HERE)
    skipped: bool = field(default=False, metadata=_HERE)

    def __post_init__(self) -> None:
        ends = [column.name for column in self.columns.ends()]
        self.ends = {f"{end}_{name}": None for name in ends for end in ("first", "last")}
        self.sums = {column.name: 0 for column in self.columns.sums()}

    def to_dict(self) -> dict[str, Any]:
        """Return it as summary.json holds it."""
        entry: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata != _HERE:
                entry |= value if one.name in ("ends", "sums") else {one.name: value}
        tokens = self.sums["tokens"]
        entry["tokens_per_second"] = round(tokens / self.seconds, 1) if self.seconds else None
        return dict(finite(entry))

    def spend(self, seconds: float) -> None:
        """Count a part of an evaluation."""
        self.evaluation_seconds += seconds

    @classmethod
    def earlier(cls, paths: AdapterPaths, columns: CourseColumns) -> "Outcome":
        """Return what an earlier attempt has left: a finished adapter, or how far one came."""
        outcome = cls(columns)
        if is_completed(paths):
            result, names = read_json(paths.result), {one.name for one in fields(cls)}
            outcome.skipped = True
            for name, value in result.items():
                if name in names:
                    setattr(outcome, name, value)
            for told in (outcome.ends, outcome.sums):
                told |= {name: result[name] for name in told if name in result}
        else:
            outcome.count_rows(read_metrics(paths.metrics))
        return outcome

    def count_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the steps of a metrics file."""
        for row in rows:
            self.steps = row["step"]
            self.count(row, row["seconds"])

    def count(self, figures: Mapping[str, Any], seconds: float) -> None:
        """Add one step."""
        self.seconds = round(self.seconds + seconds, 4)
        for name in self.sums:
            self.sums[name] += figures[name]
        for column in self.columns.ends():
            first, value = f"first_{column.name}", figures[column.name]
            if self.ends[first] is None:
                self.ends[first] = value
            self.ends[f"last_{column.name}"] = value
