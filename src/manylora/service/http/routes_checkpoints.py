"""These are the routes of training runs and checkpoints.

A checkpoint's id holds a slash (`weights/step-1`), so its two halves are two parts of the path.
"""

import time
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path as FilePath
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Query, Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from manylora.service.contract import Archive
from manylora.service.http.capacity import Capacity
from manylora.service.http.context import Routes, TheCaller, TheContext, json_body, takes
from manylora.service.http.signing import Grant
from manylora.service.http_errors import missing
from manylora.service.wire.messages import CopyWeightsRequest, TTLRequest, WeightsInfoRequest
from manylora.service.wire.paths import SCHEME, TinkerPath, identifier
from manylora.service.wire.replies import (
    CheckpointList,
    CopyWeightsReply,
    Empty,
    ExternalWeightsUrls,
    TrainingRun,
    TrainingRunList,
    WeightsInfo,
)
from manylora.types import DataError, Unsupported

router = Routes(prefix="/api/v1", tags=["checkpoints"])

ONE = "/training_runs/{model_id}/checkpoints/{kind}/{name}"
MOST = 1000
# The name that a grant gives a checkpoint's archive; no file of PEFT's is called so.
ARCHIVE = "archive.tar"

Limit = Annotated[int, Query(ge=1, le=2**31 - 1)]
Offset = Annotated[int, Query(ge=0, le=2**31 - 1)]
Info = Annotated[WeightsInfoRequest, json_body(WeightsInfoRequest)]
Copy = Annotated[CopyWeightsRequest, json_body(CopyWeightsRequest)]
TTL = Annotated[TTLRequest, json_body(TTLRequest)]


def _run(model_id: str) -> str:
    return identifier(model_id, "training run")


def _path(model_id: str, kind: str, name: str) -> TinkerPath:
    try:
        return TinkerPath.parse(f"{SCHEME}{_run(model_id)}/{kind}/{name}")
    except DataError:
        raise missing("checkpoint") from None


class ArchiveResponse(StreamingResponse):
    """An `ArchiveResponse` is an archive as it is read; closed when its client has it or goes."""

    def __init__(self, archive: Archive, name: str) -> None:
        headers = {
            "Content-Length": str(archive.size),
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        super().__init__(archive.chunks(), media_type="application/x-tar", headers=headers)
        self._archive = archive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._archive.close()


Run = Annotated[str, Depends(_run)]
Path = Annotated[TinkerPath, Depends(_path)]


@router.get("/training_runs")
async def training_runs(
    caller: TheCaller, limit: Limit = 20, offset: Offset = 0
) -> TrainingRunList:
    """The tenant's training runs, newest first."""
    async with caller.hub() as hub:
        return await hub.training_runs.page(caller.tenant, min(limit, MOST), offset)


@router.get("/training_runs/{model_id}")
async def training_run(caller: TheCaller, model_id: Run) -> TrainingRun:
    """One training run."""
    async with caller.hub() as hub:
        return await hub.training_runs.get(caller.tenant, model_id)


@router.get("/training_runs/{model_id}/checkpoints")
async def checkpoints_of(caller: TheCaller, model_id: Run) -> CheckpointList:
    """The checkpoints of one training run."""
    async with caller.hub() as hub:
        return await hub.training_runs.checkpoints(caller.tenant, model_id)


@router.get("/checkpoints")
async def checkpoints(caller: TheCaller, limit: Limit = 100, offset: Offset = 0) -> CheckpointList:
    """The checkpoints of all the tenant's training runs, newest first."""
    async with caller.hub() as hub:
        return await hub.checkpoints.page(caller.tenant, min(limit, MOST), offset)


@router.delete(ONE)
async def delete_checkpoint(caller: TheCaller, path: Path) -> Empty:
    """Delete a checkpoint and its files."""
    async with caller.hub() as hub:
        await hub.checkpoints.delete(caller.tenant, path)
    return Empty()


@router.put(f"{ONE}/ttl", openapi_extra=takes(TTLRequest))
async def set_ttl(caller: TheCaller, path: Path, message: TTL) -> Empty:
    """Let a checkpoint expire, or never."""
    async with caller.hub() as hub:
        await hub.checkpoints.set_ttl(caller.tenant, path, message.ttl_seconds)
    return Empty()


@router.post(f"{ONE}/publish")
async def publish(caller: TheCaller, path: Path) -> Empty:
    """Let every tenant of this server read a checkpoint."""
    async with caller.hub() as hub:
        await hub.checkpoints.set_public(caller.tenant, path, True)
    return Empty()


@router.delete(f"{ONE}/publish")
async def unpublish(caller: TheCaller, path: Path) -> Empty:
    """Take publish back."""
    async with caller.hub() as hub:
        await hub.checkpoints.set_public(caller.tenant, path, False)
    return Empty()


@router.post("/weights_info", openapi_extra=takes(WeightsInfoRequest))
async def weights_info(caller: TheCaller, message: Info) -> WeightsInfo:
    """What a checkpoint was trained on, and how."""
    path = TinkerPath.parse(message.tinker_path)
    async with caller.hub() as hub:
        return await hub.checkpoints.info(caller.tenant, path)


@router.post("/copy_weights", openapi_extra=takes(CopyWeightsRequest))
async def copy_weights(caller: TheCaller, message: Copy, request: Request) -> CopyWeightsReply:
    """Copy a checkpoint into a training run of its own, which is not trained."""
    token = request.headers.get("x-tinker-weights-access-token", message.weights_access_token)
    if token is not None:
        raise Unsupported("weights_access_token is not supported; publish the checkpoint instead")
    path, key = TinkerPath.parse(message.source_path), request.headers.get("x-idempotency-key")
    async with caller.hub() as hub:
        copy = await hub.copies.make(caller.tenant, message, path, key)
    return CopyWeightsReply(tinker_path=str(copy))


@router.get(f"{ONE}/archive", status_code=302, response_class=RedirectResponse)
async def archive(caller: TheCaller, path: Path, request: Request) -> RedirectResponse:
    """The address of a checkpoint's archive; who has it needs no key."""
    async with caller.hub() as hub:
        await hub.checkpoints.info(caller.tenant, path)  # it is there, and the caller may read it
    expires = int(time.time()) + caller.context.settings.url_seconds
    token = caller.context.signer.token(Grant(caller.tenant, path, ARCHIVE, expires))
    address = f"{request.state.base_url}{router.prefix}/archives/{token}"
    return RedirectResponse(address, 302, {"Expires": formatdate(expires, usegmt=True)})


@router.get(
    "/archives/{token}",
    response_class=Response,
    responses={200: {"content": {"application/x-tar": {}}}},
)
async def fetch_archive(context: TheContext, token: str, request: Request) -> Response:
    """A checkpoint's adapter as one tar of PEFT's files, by its signed address."""
    grant = context.signer.grant(token)
    if grant.file != ARCHIVE:
        raise missing("file")
    request.state.stays()
    async with context.hub.entered() as hub:
        archive = await hub.archives.open(grant.tenant, grant.path)
    return ArchiveResponse(archive, f"{grant.path.name}.tar")


@router.get(f"{ONE}/external_weights_urls")
async def external_weights_urls(
    caller: TheCaller, path: Path, request: Request
) -> ExternalWeightsUrls:
    """One address for each file of an external checkpoint; who has it needs no key."""
    if path.kind != "external_weights":
        raise missing("checkpoint")
    async with caller.hub() as hub:
        files = await hub.checkpoints.external_files(caller.tenant, path)
    expires = int(time.time()) + caller.context.settings.url_seconds
    base = f"{request.state.base_url}{router.prefix}/external_weights"
    urls = {
        name: f"{base}/{caller.context.signer.token(Grant(caller.tenant, path, name, expires))}"
        for name in files
    }
    return ExternalWeightsUrls(urls=urls, expires=datetime.fromtimestamp(expires, UTC))


@router.get(
    "/external_weights/{token}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def download(context: TheContext, token: str, request: Request) -> FileResponse:
    """A file by its signed address."""
    grant = context.signer.grant(token)
    request.state.stays()
    async with context.hub.entered() as hub:
        files = await hub.checkpoints.external_files(grant.tenant, grant.path)
    file = files.get(grant.file)
    if file is None or not await to_thread.run_sync(file.is_file):
        raise missing("file")
    return _Download(context.downloads, file)


class _Download(FileResponse):
    """A `_Download` is a file on its way, which is open until its last byte is sent."""

    def __init__(self, room: Capacity, file: FilePath):
        super().__init__(file, media_type="application/octet-stream")
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room.holding() as held:
            held.grow(1)
            await super().__call__(scope, receive, send)
