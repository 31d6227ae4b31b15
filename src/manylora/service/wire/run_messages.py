"""The plain API has messages about runs that the server trains by itself, and about adapters."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from manylora.config import AdapterEntry
from manylora.service.wire.messages import BaseName, WireRequest
from manylora.service.wire.replies import Cursor, Reply

RunStatus = Literal["queued", "running", "cancelling", "completed", "failed", "cancelled"]
ENDED: frozenset[RunStatus] = frozenset(("completed", "failed", "cancelled"))


class Data(BaseModel):
    """Data that come with a request: the text of JSON Lines files."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    train: Annotated[str, Field(min_length=1)]
    eval: Annotated[str, Field(min_length=1)] | None = None


class SubmitRunRequest(WireRequest):
    """POST runs. Unlike the wire's own messages it takes no field that is not known.

    Attributes:
        adapter: as an entry of a run file. With `data`, `sft.train` and `sft.eval` are what
            messages call those; without, they name files in the server's `data_roots`.
        base_model: what the client believes the server's base to be.
    """

    model_config = ConfigDict(extra="forbid")

    adapter: AdapterEntry
    data: Data | None = None
    base_model: BaseName | None = None


class RunError(Reply):
    """Why a run failed."""

    type: str
    message: str


class EvalFigures(Reply):
    """What was measured on the evaluation data, before or after training."""

    loss: float | None = None
    exact_match: float | None = None
    samples: int = 0


class Run(Reply):
    """A run as it is now.

    Attributes:
        step, steps: optimizer steps made, and planned (0 = not known yet).
        first_loss, last_loss: mean per trained token.
        warnings: what the run's owner should know of its data.
        path: the trained adapter (`weights/final`; of a run that broke off, `weights/last`).
        external_path: the same as PEFT's files.
        metrics: a row for each of the last steps; only where one run is asked for.
    """

    id: str
    name: str
    status: RunStatus
    created_at: datetime
    updated_at: datetime
    step: int = 0
    steps: int = 0
    num_params: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    resumed_from: int = 0
    eval_before: EvalFigures | None = None
    eval_after: EvalFigures | None = None
    error: RunError | None = None
    warnings: list[str] = Field(default_factory=list)
    path: str | None = None
    external_path: str | None = None
    metrics: list[dict[str, Any]] | None = None


class RunList(Reply):
    runs: list[Run]
    cursor: Cursor


class Adapter(Reply):
    """An open model.

    Attributes:
        step: optimizer steps made.
        running: operations that are queued or being run.
        fault: why it can no longer be used.
    """

    adapter_id: str
    session_id: str
    base_model: str
    rank: int
    created_at: datetime
    step: int
    running: int
    fault: str | None = None


class AdapterList(Reply):
    adapters: list[Adapter]
