"""Checkpoints have `tinker://` paths, folders behind them, and rules of who may do what."""

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.config import ServerFile
from manylora.hosting import Host
from manylora.hosting.state_files import write_peft, write_state
from manylora.lora.state import AdapterState
from manylora.service.http_errors import QuotaExceeded, missing
from manylora.service.state.listings import listed, weights_info
from manylora.service.wire.paths import PathKind, TinkerPath
from manylora.service.wire.replies import CheckpointList, Cursor, WeightsInfo
from manylora.store import CheckpointRow, Store
from manylora.types import CheckpointExists, DataError, SaveFailed

Spec = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOrder:
    """A `CheckpointOrder` is a checkpoint that was asked for."""

    path: TinkerPath
    tenant: str
    request_id: str
    seq: int
    spec: Spec
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Mapping[str, str] | None = None


class Checkpoints:
    """`Checkpoints` are all those of a server."""

    def __init__(self, store: Store, folder: Path, settings: ServerFile):
        """Keep the files below `folder`, the data directory."""
        self._rows = store.checkpoints
        self._folder = folder
        self._settings = settings

    # -- making one (on the writer's thread) ---------------------------------------------------

    def write(self, host: Host, order: CheckpointOrder, state: AdapterState) -> CheckpointRow:
        """Write an adapter's state as a checkpoint. A request that comes again changes nothing.
        Raises CheckpointExists (the name is taken), QuotaExceeded, SaveFailed."""

        def put(folder: Path) -> None:
            if order.path.kind == "external_weights":
                write_peft(host.engine, folder, state)
            else:
                write_state(host.engine, folder, state, position=0)

        return self._keep(order, state.step, put)

    def adopt(self, order: CheckpointOrder, source: Path, step: int) -> CheckpointRow:
        """Make a folder that is whole a checkpoint, without a copy. See `write`."""
        return self._keep(order, step, lambda folder: link_folder(source, folder))

    def _keep(
        self, order: CheckpointOrder, step: int, put: Callable[[Path], None]
    ) -> CheckpointRow:
        path, existing = str(order.path), self._rows.get(order.tenant, str(order.path))
        if existing is not None and existing.request_id == order.request_id:
            return existing
        if existing is not None and not order.overwrite:
            raise CheckpointExists(f"{path} exists: take another name, or pass overwrite=True")
        model = order.path.model_id.replace(":", "_")
        relative = f"checkpoints/{model}/{order.path.kind}/{order.path.name}@{order.seq}"
        folder = self._folder / relative
        put(folder)
        size = _bytes_below(folder)
        self._check_quota(order.tenant, size, existing, folder)
        row = CheckpointRow(
            path=path, tenant=order.tenant, model_id=order.path.model_id, kind=order.path.kind,
            name=order.path.name, folder=relative, size_bytes=size, created_at=time.time(),
            request_id=order.request_id, spec=dict(order.spec), step=step,
            expires_at=None if order.ttl_seconds is None else time.time() + order.ttl_seconds,
            user_metadata=dict(order.user_metadata or {}),
        )  # fmt: skip
        replaced = self._rows.put(row, overwrite=order.overwrite)
        if replaced is not None and replaced.folder != relative:
            self._remove(replaced)
        return row

    def _check_quota(
        self, tenant: str, size: int, replaced: CheckpointRow | None, folder: Path
    ) -> None:
        limit = self._settings.quotas.checkpoint_bytes
        held = self._rows.bytes_of(tenant)
        held -= replaced.size_bytes if replaced is not None else 0
        if held + size > limit:
            shutil.rmtree(folder, ignore_errors=True)
            raise QuotaExceeded(
                f"your checkpoints take {held:,} bytes, this one {size:,} more, and {limit:,} is "
                "the limit: delete some, or give them a ttl"
            )

    # -- using one ---------------------------------------------------

    async def readable(self, tenant: str, path: TinkerPath, *kinds: PathKind) -> CheckpointRow:
        """Return a checkpoint that the tenant may read: its own, or a published one. Raises
        NotFound: there is none; DataError: it is of another kind."""
        row = _there(await asyncio.to_thread(self._rows.readable, tenant, str(path)))
        if row.kind not in kinds:
            raise DataError(f"{path} holds {row.kind}; here {' or '.join(kinds)} is needed")
        return row

    def folder_of(self, row: CheckpointRow) -> Path:
        """Return where its files lie."""
        return self._folder / row.folder

    def link(self, row: CheckpointRow, target: Path) -> None:
        """Give the files a second name, under which they stay when the checkpoint goes.
        Raises SaveFailed."""
        link_folder(self.folder_of(row), target)

    async def info(self, tenant: str, path: TinkerPath) -> WeightsInfo:
        """Tell what a checkpoint that is `readable` to the tenant was trained on, and how."""
        return weights_info(await self.readable(tenant, path, path.kind))

    async def external_files(self, tenant: str, path: TinkerPath) -> dict[str, Path]:
        """Return the files of an external checkpoint by name."""
        row = await self.readable(tenant, path, "external_weights")
        folder = self.folder_of(row)
        return {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}

    # -- lists and changes ---------------------------------------------------

    async def get(self, tenant: str, path: TinkerPath) -> CheckpointRow:
        """Return the tenant's own checkpoint. Raises NotFound."""
        return _there(await asyncio.to_thread(self._rows.get, tenant, str(path)))

    async def of_model(self, tenant: str, model_id: str) -> list[CheckpointRow]:
        """Return all checkpoints of one training run, oldest first."""
        return await asyncio.to_thread(self._rows.of_model, tenant, model_id)

    async def page(self, tenant: str, limit: int, offset: int) -> CheckpointList:
        """Return a tenant's checkpoints, newest first."""
        page = await asyncio.to_thread(self._rows.page, tenant, limit, offset)
        cursor = Cursor(offset=offset, limit=limit, total_count=page.total)
        return CheckpointList(checkpoints=[listed(row) for row in page.rows], cursor=cursor)

    async def delete(self, tenant: str, path: TinkerPath) -> None:
        """Delete a checkpoint and its files. Raises NotFound."""
        row = _there(await asyncio.to_thread(self._rows.delete, tenant, str(path)))
        await asyncio.to_thread(self._remove, row)

    async def set_ttl(self, tenant: str, path: TinkerPath, seconds: int | None) -> None:
        """Let a checkpoint expire that many seconds from now; None = never. Raises NotFound."""
        _there(await asyncio.to_thread(self._rows.set_ttl, tenant, str(path), seconds))

    async def set_public(self, tenant: str, path: TinkerPath, public: bool) -> None:
        """Let other tenants read a checkpoint, or not any more. Raises NotFound."""
        _there(await asyncio.to_thread(self._rows.set_public, tenant, str(path), public))

    def remove_expired(self) -> int:
        """Delete what is past its time (any thread); return how many."""
        expired = self._rows.expired()
        for row in expired:
            if self._rows.drop(row):
                self._remove(row)
        return len(expired)

    def _remove(self, row: CheckpointRow) -> None:
        shutil.rmtree(self.folder_of(row), ignore_errors=True)


def _there(row: CheckpointRow | None) -> CheckpointRow:
    """Return the row that was found. Raises NotFound: there was none."""
    if row is None:
        raise missing("checkpoint")
    return row


def link_folder(source: Path, target: Path) -> None:
    """Give a folder's files a second name each. Raises SaveFailed."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        for file in source.iterdir():
            os.link(file, partial / file.name)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists():
            raise SaveFailed(f"{target.name} could not be linked: {error}") from error


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
