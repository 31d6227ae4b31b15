"""Lists show training runs: what was trained, open or closed, and its checkpoints."""

import asyncio

from manylora.service.http_errors import missing
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.listings import listed, training_run
from manylora.service.wire.replies import (
    CheckpointList,
    Cursor,
    ModelData,
    ModelInfo,
    TrainingRun,
    TrainingRunList,
)
from manylora.store import ModelRow, Store


class TrainingRuns:
    """`TrainingRuns` are those of a server; see `contract.TrainingRunsApi`."""

    def __init__(self, store: Store, checkpoints: Checkpoints):
        self._store = store
        self._checkpoints = checkpoints

    async def model_info(self, tenant: str, model_id: str) -> ModelInfo:
        row = await self._row(tenant, model_id)
        return ModelInfo(
            model_id=model_id,
            model_data=ModelData(model_name=row.base_model, tokenizer_id=row.base_model),
            lora_rank=int(row.spec["rank"]),
            model_name=row.base_model,
        )

    async def get(self, tenant: str, model_id: str) -> TrainingRun:
        row = await self._row(tenant, model_id)
        return training_run(row, await self._checkpoints.of_model(tenant, model_id))

    async def page(self, tenant: str, limit: int, offset: int) -> TrainingRunList:
        page = await asyncio.to_thread(self._store.models.page, tenant, limit, offset)
        runs = [training_run(r, await self._checkpoints.of_model(tenant, r.id)) for r in page.rows]
        cursor = Cursor(offset=offset, limit=limit, total_count=page.total)
        return TrainingRunList(training_runs=runs, cursor=cursor)

    async def checkpoints(self, tenant: str, model_id: str) -> CheckpointList:
        await self._row(tenant, model_id)
        rows = await self._checkpoints.of_model(tenant, model_id)
        return CheckpointList(checkpoints=[listed(row) for row in rows])

    async def _row(self, tenant: str, model_id: str) -> ModelRow:
        row = await asyncio.to_thread(self._store.models.get, tenant, model_id)
        if row is None:
            raise missing("training run")
        return row
