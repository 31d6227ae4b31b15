"""Rows of the database become what clients see."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.replies import Checkpoint, TrainingRun, WeightsInfo
from manylora.service.wire.run_messages import EvalFigures, Run, RunError, RunStatus
from manylora.store import CheckpointRow, ModelRow, RunRow


def training_run(row: ModelRow, checkpoints: Sequence[CheckpointRow]) -> TrainingRun:
    """Describe a model, open or closed, with its newest checkpoints."""
    training = [listed(r) for r in checkpoints if r.kind == "weights"]
    sampler = [listed(r) for r in checkpoints if r.kind == "sampler_weights"]
    return TrainingRun(
        training_run_id=row.id,
        base_model=row.base_model,
        model_owner=row.tenant,
        last_request_time=moment(row.last_request_at),
        lora_rank=int(row.spec["rank"]),
        corrupted=row.fault is not None,
        last_checkpoint=training[-1] if training else None,
        last_sampler_checkpoint=sampler[-1] if sampler else None,
        user_metadata=row.user_metadata or None,
    )


def weights_info(row: CheckpointRow) -> WeightsInfo:
    """Tell what a checkpoint was trained on, and how."""
    return WeightsInfo(
        base_model=str(row.spec["base_model"]),
        lora_rank=int(row.spec["rank"]),
        train_unembed=bool(row.spec["train_unembed"]),
        train_mlp=bool(row.spec["train_mlp"]),
        train_attn=bool(row.spec["train_attn"]),
    )


def listed(row: CheckpointRow) -> Checkpoint:
    """Return a checkpoint as lists show it."""
    path = TinkerPath.parse(row.path)
    return Checkpoint(
        checkpoint_id=path.checkpoint_id,
        checkpoint_type=path.checkpoint_type,
        time=moment(row.created_at),
        tinker_path=row.path,
        size_bytes=row.size_bytes,
        public=row.public,
        user_metadata=row.user_metadata or None,
        expires_at=None if row.expires_at is None else moment(row.expires_at),
    )


def run_info(row: RunRow, figures: Mapping[str, Any] | None = None) -> Run:
    """Return a run as it is now. The `figures` say how far it is, if the database does not know
    yet; see `runs.Outcome.to_dict`."""
    known = row.progress if figures is None else figures
    error, name = known.get("error"), "final" if row.status == "completed" else "last"
    path = None if row.model_id is None else f"tinker://{row.model_id}"
    return Run(
        id=row.id,
        name=row.name,
        status=cast(RunStatus, row.status),
        created_at=moment(row.created_at),
        updated_at=moment(row.updated_at),
        step=known.get("steps", 0),
        steps=known.get("total_steps", 0),
        num_params=known.get("num_params", 0),
        first_loss=known.get("first_loss"),
        last_loss=known.get("last_loss"),
        tokens=known.get("tokens", 0),
        seconds=known.get("seconds", 0.0),
        resumed_from=known.get("resumed_from", 0),
        eval_before=_evaluated(known.get("eval_before")),
        eval_after=_evaluated(known.get("eval_after")),
        error=None if error is None else RunError(**error),
        warnings=known.get("warnings") or [],
        path=None if path is None else f"{path}/weights/{name}",
        external_path=f"{path}/external_weights/{name}" if path and name == "final" else None,
    )


def _evaluated(figures: Mapping[str, Any] | None) -> EvalFigures | None:
    return None if figures is None else EvalFigures(**figures)


def moment(seconds: float) -> datetime:
    """Return unix seconds as a time."""
    return datetime.fromtimestamp(seconds, UTC)
