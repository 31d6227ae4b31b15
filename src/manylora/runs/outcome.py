"""How an adapter ended."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from manylora.runs.events import Status, finite
from manylora.runs.metrics_file import read_metrics
from manylora.runs.run_folder import AdapterPaths, is_completed, read_json

# What is only of use to the process that is at work.
_HERE = frozenset({"trained_here", "training_seconds", "evaluation_seconds", "skipped"})


def error_dict(error: Exception) -> dict[str, str]:
    """An error as files and JSON hold it."""
    return {"type": type(error).__name__, "message": str(error)}


@dataclass(slots=True)
class Outcome:
    """How an adapter ended; its part of summary.json.

    Attributes:
        steps: optimizer steps that are behind the adapter; total_steps: that were planned.
        tokens, trained_tokens: of all steps, those before a resume included.
        evaluations: while it trained, each with its step.
        warnings: what its owner should know.
        seconds: of the device, in batches with steps of this adapter; those before a resume
            included.
        trained_here: tokens that this process trained (for the rate of the whole run).
        training_seconds, evaluation_seconds: this adapter's share of the device's time here.
    """

    status: Status | None = None
    steps: int = 0
    total_steps: int = 0
    num_params: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_before: dict[str, Any] | None = None
    eval_after: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    resumed_from: int = 0
    error: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)
    trained_here: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    skipped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As summary.json holds it."""
        entry = {key: value for key, value in asdict(self).items() if key not in _HERE}
        entry["tokens_per_second"] = round(self.tokens / self.seconds, 1) if self.seconds else None
        return dict(finite(entry))

    def spend(self, seconds: float) -> None:
        """Count a part of an evaluation."""
        self.evaluation_seconds += seconds

    @classmethod
    def earlier(cls, paths: AdapterPaths) -> "Outcome":
        """What an earlier attempt has left: a finished adapter, or how far one came."""
        if is_completed(paths):
            result = read_json(paths.result)
            names = {one.name for one in fields(cls)}
            return cls(**{k: v for k, v in result.items() if k in names}, skipped=True)
        outcome = cls()
        outcome.count_rows(read_metrics(paths.metrics))
        return outcome

    def count_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the steps of a metrics file."""
        for row in rows:
            self.steps = row["step"]
            self.count(row["tokens"], row["trained_tokens"], row["seconds"], row["loss"])

    def count(self, tokens: int, trained: int, seconds: float, loss: float | None) -> None:
        """Add one step."""
        self.tokens += tokens
        self.trained_tokens += trained
        self.seconds = round(self.seconds + seconds, 4)
        if self.first_loss is None:
            self.first_loss = loss
        self.last_loss = loss
