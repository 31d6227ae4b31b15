"""A copy of a checkpoint is a training run of its own that holds it alone and is not trained.

A copy's files are those of its source by a second name, so it costs no room and stays when the
source goes.
"""

import asyncio
import hashlib
import secrets
import time

from manylora.service.state.checkpoints import CheckpointOrder, Checkpoints
from manylora.service.state.resources import Resources
from manylora.service.state.sessions import Sessions
from manylora.service.wire.codec import digest_json
from manylora.service.wire.messages import CopyWeightsRequest, Slot
from manylora.service.wire.paths import TinkerPath
from manylora.store import CheckpointRow, ModelRow, SessionRow

ID_BYTES = 12


class Copies:
    """`Copies` makes copies, each once however often it is asked for."""

    def __init__(self, resources: Resources, checkpoints: Checkpoints, sessions: Sessions):
        self._resources = resources
        self._checkpoints = checkpoints
        self._sessions = sessions

    async def make(
        self, tenant: str, request: CopyWeightsRequest, path: TinkerPath, key: str | None
    ) -> TinkerPath:
        """Copy the checkpoint at `path`, the tenant's own or a published one. Return the copy's
        path: the same kind and name in a training run of its own. `key` is the client's word for
        this one request; the same again gives the same copy.

        Raises:
            NotFound, Gone: no such checkpoint or session. Conflict: the number in the session was
            used for something else. QuotaExceeded. SaveFailed.
        """
        source = await self._checkpoints.readable(tenant, path, path.kind)
        if request.session_id is not None and request.model_seq_id is not None:
            await self._sessions.require(tenant, request.session_id)
            slot, made = Slot(request.session_id, request.model_seq_id), None
        else:
            made = _session(tenant, key)
            slot = Slot(made.id, 0)
        row = _row(tenant, slot, request, source)
        return await asyncio.to_thread(self._make, made, row, source, request.ttl_seconds)

    def _make(
        self, session: SessionRow | None, row: ModelRow, source: CheckpointRow, ttl: int | None
    ) -> TinkerPath:
        store = self._resources.store
        if session is not None and store.sessions.get(session.tenant, session.id) is None:
            store.sessions.create(session)
        store.models.create(row)
        copy = TinkerPath(row.id, source.kind, source.name)
        order = CheckpointOrder(
            path=copy, tenant=row.tenant, request_id=f"{row.id}:copy", seq=0, spec=source.spec,
            ttl_seconds=ttl, user_metadata=source.user_metadata,
        )  # fmt: skip
        self._checkpoints.adopt(order, self._checkpoints.folder_of(source), source.step)
        return copy


def _session(tenant: str, key: str | None) -> SessionRow:
    """Return a session that is over before it begins, for a copy of no client's session."""
    now, word = time.time(), key or secrets.token_hex(ID_BYTES)
    digest = hashlib.sha256(f"{tenant}\0{word}".encode()).hexdigest()
    return SessionRow(
        id=f"c{digest[: 2 * ID_BYTES]}", tenant=tenant, created_at=now, last_seen_at=now,
        ended_at=now, end_reason="success", end_detail="a copy of a checkpoint",
    )  # fmt: skip


def _row(tenant: str, slot: Slot, request: CopyWeightsRequest, source: CheckpointRow) -> ModelRow:
    """Return a training run that is closed from its beginning."""
    now = time.time()
    return ModelRow(
        id=slot.model_id, tenant=tenant, session_id=slot.session_id,
        model_seq_id=slot.number, base_model=str(source.spec["base_model"]), spec=dict(source.spec),
        digest=digest_json(request), created_at=now, last_request_at=now, source_path=source.path,
        step=source.step, closed_at=now,
    )  # fmt: skip
