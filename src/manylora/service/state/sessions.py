"""Sessions are client processes that say every few seconds that they live."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manylora.service.http_errors import Gone, QuotaExceeded, missing
from manylora.service.wire.messages import CreateSessionRequest, FinishSessionRequest
from manylora.store import SessionRow, Store


@dataclass(slots=True)
class Session:
    """A `Session` is open; `heard_at` is when its client last gave a sign of life."""

    id: str
    tenant: str
    heard_at: float


class Sessions:
    """`Sessions` are the open ones of a server, with those that ended in the database."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        most: int,
        finished: Callable[[Session], None],
    ):
        """Know no session yet. `clock` is of silences, and monotonic; a tenant may have `most` of
        them, open or over; `finished` is called with each session that its client has ended."""
        self._most = most
        self._finished = finished
        self._store = store
        self._clock = clock
        self._open: dict[str, Session] = {}

    async def create(self, tenant: str, request: CreateSessionRequest) -> str:
        """Make a session and return its id. Raises QuotaExceeded."""
        held = await asyncio.to_thread(self._store.tidying.count_sessions, tenant)
        if held >= self._most:
            raise QuotaExceeded(
                f"you have {held:,} sessions, and {self._most:,} are remembered, open or over: "
                "work in one that is open, or come again when old ones have been forgotten"
            )
        id, now = f"s{secrets.token_hex(12)}", time.time()
        row = SessionRow(
            id=id, tenant=tenant, created_at=now, last_seen_at=now,
            tags=list(request.tags), user_metadata=dict(request.user_metadata or {}),
            sdk_version=request.sdk_version,
        )  # fmt: skip
        await asyncio.to_thread(self._store.sessions.create, row)
        self._open[id] = Session(id, tenant, self._clock())
        return id

    def restore(self, row: SessionRow) -> None:
        """Take up a session open when the server stopped; its silence starts anew."""
        self._open[row.id] = Session(row.id, row.tenant, self._clock())

    async def require(self, tenant: str, session_id: str) -> Session:
        """Return the session, which was just heard of. Raises NotFound: the tenant has none of that
        id; Gone: it is over."""
        session = self._open.get(session_id)
        if session is not None and session.tenant == tenant:
            session.heard_at = self._clock()
            return session
        if session is None:
            row = await asyncio.to_thread(self._store.sessions.get, tenant, session_id)
            if row is not None:
                raise Gone(f"session {session_id!r} is over ({row.end_reason}); start a new one")
        raise missing("session")

    async def end(self, session: Session, reason: str, detail: str = "") -> None:
        """End a session; the first reason stays."""
        self._open.pop(session.id, None)
        await asyncio.to_thread(
            self._store.sessions.end, session.tenant, session.id, reason, detail
        )

    async def finish(self, tenant: str, session_id: str, request: FinishSessionRequest) -> None:
        """End a session by its client's word, unless it is over already."""
        try:
            session = await self.require(tenant, session_id)
        except Gone:
            return
        await self.end(session, request.reason.type, request.detail or "")
        self._finished(session)

    def silent(self, seconds: float) -> Iterator[Session]:
        """Yield open sessions that were not heard of for so long."""
        limit = self._clock() - seconds
        return iter([s for s in self._open.values() if s.heard_at < limit])

    def is_open(self, session_id: str) -> bool:
        """Return whether the session may still ask for things."""
        return session_id in self._open

    def open_ids(self) -> list[str]:
        """Return ids of the open sessions."""
        return list(self._open)
