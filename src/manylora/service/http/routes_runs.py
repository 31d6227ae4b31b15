"""The plain API has runs that the server trains by itself, and adapters that clients have open."""

from typing import Annotated

from fastapi import Depends, Query

from manylora.service.http.context import Routes, TheCaller, json_body, takes
from manylora.service.http.routes_checkpoints import MOST, Limit, Offset
from manylora.service.wire.paths import identifier
from manylora.service.wire.run_messages import Adapter, AdapterList, Run, RunList, SubmitRunRequest

router = Routes(prefix="/api/v1", tags=["runs"])

NewRun = Annotated[SubmitRunRequest, json_body(SubmitRunRequest)]
After = Annotated[int, Query(ge=0, le=2**31 - 1)]


def _run_id(run_id: str) -> str:
    return identifier(run_id, "run")


def _adapter_id(adapter_id: str) -> str:
    return identifier(adapter_id, "adapter")


RunId = Annotated[str, Depends(_run_id)]
AdapterId = Annotated[str, Depends(_adapter_id)]


@router.post("/runs", openapi_extra=takes(SubmitRunRequest))
async def submit_run(caller: TheCaller, message: NewRun) -> Run:
    """Train an adapter beside everybody else's; it is durable when this answers."""
    async with caller.hub() as hub:
        return await hub.runs.submit(caller.tenant, message)


@router.get("/runs")
async def runs(caller: TheCaller, limit: Limit = 20, offset: Offset = 0) -> RunList:
    """The tenant's runs, newest first."""
    async with caller.hub() as hub:
        return await hub.runs.page(caller.tenant, min(limit, MOST), offset)


@router.get("/runs/{run_id}")
async def run(caller: TheCaller, run_id: RunId, after: After = 0) -> Run:
    """One run, with figures of its last steps (at most 1,000) after the one of that number."""
    async with caller.hub() as hub:
        return await hub.runs.get(caller.tenant, run_id, after)


@router.delete("/runs/{run_id}")
async def cancel_run(caller: TheCaller, run_id: RunId) -> Run:
    """Have a run end and keep what it has learned; one that is over stays as it is."""
    async with caller.hub() as hub:
        return await hub.runs.cancel(caller.tenant, run_id)


@router.get("/adapters")
async def adapters(caller: TheCaller) -> AdapterList:
    """The tenant's open models."""
    async with caller.hub() as hub:
        return await hub.adapters.page(caller.tenant)


@router.get("/adapters/{adapter_id}")
async def adapter(caller: TheCaller, adapter_id: AdapterId) -> Adapter:
    """One open model."""
    async with caller.hub() as hub:
        return await hub.adapters.get(caller.tenant, adapter_id)


@router.delete("/adapters/{adapter_id}")
async def close_adapter(caller: TheCaller, adapter_id: AdapterId) -> Adapter:
    """Close a model after what is queued for it; what it has learned since it was last saved is
    kept as its checkpoint `last`."""
    async with caller.hub() as hub:
        return await hub.adapters.end(caller.tenant, adapter_id)
