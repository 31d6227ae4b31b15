"""Keys tell who may come in, and sessions who is there."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable

from sqlalchemy import select, update

from manylora.store.database import Queries, chunks
from manylora.store.records import KeyRow, Page, SessionRow
from manylora.store.tables import Key, SessionTable
from manylora.types import ConfigError, Conflict

KEY_START = "tml-"
# What a listing shows: enough to tell keys apart, far too little to guess the rest.
_PREFIX = len(KEY_START) + 6
_LONGEST_KEY = 200
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class Keys(Queries):
    """`Keys` are API keys. A key is shown once; kept are a hash of it and its first characters."""

    def create(self, tenant: str) -> str:
        """Make a new key of that tenant; it is shown only this time. Raises ConfigError if that is
        not a name for a tenant."""
        if not _TENANT.fullmatch(tenant):
            raise ConfigError(
                f"{tenant!r} cannot name a tenant: letters, digits and . _ @ - (64 at most, "
                "beginning with a letter or a digit)"
            )
        key = KEY_START + secrets.token_urlsafe(32)
        record = Key(
            id=f"key-{secrets.token_hex(6)}",
            tenant=tenant,
            prefix=key[:_PREFIX],
            hash=_hash(key),
            created_at=self._clock(),
        )
        self._database.write(lambda session: session.add(record))
        return key

    def of(self, tenant: str | None = None) -> list[KeyRow]:
        """Return the keys of a tenant, or of all; revoked ones too."""
        where = [] if tenant is None else [Key.tenant == tenant]
        return self._database.all(Key, *where, order=(Key.tenant, Key.created_at, Key.id))

    def revoke(self, tenant: str, key: str | None = None) -> int:
        """Let a key (its id, its prefix, or all of it) open nothing more; None = all of the tenant.
        Return how many keys this revoked."""
        query = update(Key).where(Key.tenant == tenant, Key.revoked_at.is_(None))
        if key is not None:
            whole = key.startswith(KEY_START) and len(key) > _PREFIX
            query = query.where(
                Key.hash == _hash(key) if whole else (Key.id == key) | (Key.prefix == key)
            )
        query = query.values(revoked_at=self._clock())
        return self._database.change(query)

    def lookup(self, key: str) -> str | None:
        """Return the tenant whose key this is; None if it is unknown or was revoked."""
        if not key.startswith(KEY_START) or not key.isascii() or len(key) > _LONGEST_KEY:
            return None
        query = select(Key.hash, Key.tenant).where(
            Key.prefix == key[:_PREFIX], Key.revoked_at.is_(None)
        )
        candidates = self._database.read(lambda session: session.execute(query).all())
        hashed, found = _hash(key), None
        for stored, tenant in candidates:
            if hmac.compare_digest(stored, hashed):
                found = tenant
        return found

    def any_keys(self) -> bool:
        """Return whether a key was ever made. Revoking the last one changes nothing here."""
        query = select(Key.id).limit(1)
        return self._database.read(lambda session: session.scalar(query) is not None)


def _hash(key: str) -> str:
    # A key is 256 random bits: there is nothing to guess that a slow hash would protect.
    return hashlib.sha256(key.encode()).hexdigest()


class SessionQueries(Queries):
    """Sessions are client processes."""

    def create(self, row: SessionRow) -> SessionRow:
        """Make a session. Raises Conflict if the id is taken by another session."""

        def check(present: SessionRow) -> None:
            if present != row:
                raise Conflict(f"session {row.id} exists")

        return self._database.make(SessionTable, row, SessionTable.id == row.id, check)

    def get(self, tenant: str, id: str) -> SessionRow | None:
        return self._database.one(
            SessionTable, SessionTable.id == id, SessionTable.tenant == tenant
        )

    def page(self, tenant: str, limit: int = 20, offset: int = 0) -> Page[SessionRow]:
        """Return a tenant's sessions, the newest first."""
        order = (SessionTable.created_at.desc(), SessionTable.id)
        return self._database.page(
            SessionTable, SessionTable.tenant == tenant, order=order, limit=limit, offset=offset
        )

    def open(self) -> list[SessionRow]:
        """Return all tenants' sessions that have not ended, the longest silent first."""
        order = (SessionTable.last_seen_at, SessionTable.id)
        return self._database.all(SessionTable, SessionTable.ended_at.is_(None), order=order)

    def touch(self, ids: Iterable[str], at: float | None = None) -> None:
        """Note that they are alive. Time does not run backwards, and the ended stay as they are."""
        at = self._clock() if at is None else at
        older = (SessionTable.ended_at.is_(None), SessionTable.last_seen_at < at)
        for some in chunks(ids):
            query = update(SessionTable).where(SessionTable.id.in_(some), *older)
            self._database.change(query.values(last_seen_at=at))

    def end(self, tenant: str, id: str, reason: str, detail: str = "") -> SessionRow | None:
        """End a session; the first reason stays. Return the session, or None if there is none."""
        own = (SessionTable.id == id, SessionTable.tenant == tenant)
        query = update(SessionTable).where(*own, SessionTable.ended_at.is_(None))
        ended = query.values(ended_at=self._clock(), end_reason=reason, end_detail=detail)
        self._database.change(ended)
        return self.get(tenant, id)
