"""The half of the hub that lists and changes what is kept: training runs and checkpoints."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from manylora.service.keeping import Keeping, listed
from manylora.service.models import Models
from manylora.service.parts import Parts
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.replies import (
    CheckpointList,
    Cursor,
    TrainingRun,
    TrainingRunList,
    WeightsInfo,
)
from manylora.store import ModelRow


class Shelves:
    """See `contract.Hub`."""

    parts: Parts
    keeping: Keeping
    models: Models

    async def training_run(self, tenant: str, model_id: str) -> TrainingRun:
        return await self._training_run(await self.models.row(tenant, model_id))

    async def training_runs(self, tenant: str, limit: int, offset: int) -> TrainingRunList:
        page = await asyncio.to_thread(self.parts.store.models.page, tenant, limit, offset)
        runs = [await self._training_run(row) for row in page.rows]
        cursor = Cursor(offset=offset, limit=limit, total_count=page.total)
        return TrainingRunList(training_runs=runs, cursor=cursor)

    async def checkpoints_of(self, tenant: str, model_id: str) -> CheckpointList:
        await self.models.row(tenant, model_id)
        rows = await self.keeping.of_model(tenant, model_id)
        return CheckpointList(checkpoints=[listed(row) for row in rows])

    async def checkpoints(self, tenant: str, limit: int, offset: int) -> CheckpointList:
        return await self.keeping.page(tenant, limit, offset)

    async def delete_checkpoint(self, tenant: str, path: TinkerPath) -> None:
        await self.keeping.delete(tenant, path)

    async def set_ttl(self, tenant: str, path: TinkerPath, ttl_seconds: int | None) -> None:
        await self.keeping.set_ttl(tenant, path, ttl_seconds)

    async def set_public(self, tenant: str, path: TinkerPath, public: bool) -> None:
        await self.keeping.set_public(tenant, path, public)

    async def weights_info(self, tenant: str, path: TinkerPath) -> WeightsInfo:
        row = await self.keeping.readable(
            tenant, path, "weights", "sampler_weights", "external_weights"
        )
        return WeightsInfo(
            base_model=str(row.spec["base_model"]),
            lora_rank=int(row.spec["rank"]),
            train_unembed=bool(row.spec["train_unembed"]),
            train_mlp=bool(row.spec["train_mlp"]),
            train_attn=bool(row.spec["train_attn"]),
        )

    async def external_files(self, tenant: str, path: TinkerPath) -> Mapping[str, Path]:
        return await self.keeping.external_files(tenant, path)

    async def _training_run(self, row: ModelRow) -> TrainingRun:
        rows = await self.keeping.of_model(row.tenant, row.id)
        training = [listed(r) for r in rows if r.kind == "weights"]
        sampler = [listed(r) for r in rows if r.kind == "sampler_weights"]
        return TrainingRun(
            training_run_id=row.id,
            base_model=row.base_model,
            model_owner=row.tenant,
            last_request_time=_moment(row.last_request_at),
            lora_rank=int(row.spec["rank"]),
            corrupted=row.fault is not None,
            last_checkpoint=training[-1] if training else None,
            last_sampler_checkpoint=sampler[-1] if sampler else None,
            user_metadata=row.user_metadata or None,
        )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
