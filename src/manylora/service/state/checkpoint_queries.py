"""The half of the hub that lists and changes what is kept: training runs and checkpoints."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from manylora.service.state.archives import Archives, TarArchive
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.copies import Copies
from manylora.service.state.listings import listed, training_run, weights_info
from manylora.service.state.open_adapters import OpenAdapters
from manylora.service.state.resources import Resources
from manylora.service.wire.messages import CopyWeightsRequest
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.replies import (
    CheckpointList,
    Cursor,
    TrainingRun,
    TrainingRunList,
    WeightsInfo,
)


class Shelves:
    """See `contract.Hub`."""

    parts: Resources
    keeping: Checkpoints
    copies: Copies
    archives: Archives
    models: OpenAdapters

    async def training_run(self, tenant: str, model_id: str) -> TrainingRun:
        row = await self.models.row(tenant, model_id)
        return training_run(row, await self.keeping.of_model(tenant, model_id))

    async def training_runs(self, tenant: str, limit: int, offset: int) -> TrainingRunList:
        page = await asyncio.to_thread(self.parts.store.models.page, tenant, limit, offset)
        runs = [training_run(r, await self.keeping.of_model(tenant, r.id)) for r in page.rows]
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
        return weights_info(row)

    async def copy_weights(
        self, tenant: str, request: CopyWeightsRequest, path: TinkerPath, key: str | None
    ) -> TinkerPath:
        return await self.copies.make(tenant, request, path, key)

    async def archive(self, tenant: str, path: TinkerPath) -> TarArchive:
        return await self.archives.open(tenant, path)

    async def external_files(self, tenant: str, path: TinkerPath) -> Mapping[str, Path]:
        return await self.keeping.external_files(tenant, path)
