"""Rows tell which checkpoints exist, whose they are, and when they go."""

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session as OrmSession

from manylora.store.database import Queries
from manylora.store.records import CheckpointRow, Page
from manylora.store.tables import CheckpointTable
from manylora.types import CheckpointExists


class CheckpointQueries(Queries):
    """These rows name folders. One whose time is over is missing in every answer but `expired`."""

    def put(self, row: CheckpointRow, overwrite: bool = False) -> CheckpointRow | None:
        """Name a folder that is complete. The request that made a checkpoint may come again.

        Return the row that this one replaced (its folder may go); None if there was none, or if
        this request had made it already, which leaves everything as it was. Raises
        CheckpointExists: the path is taken, and `overwrite` is false.
        """

        def work(session: OrmSession) -> CheckpointRow | None:
            present = session.get(CheckpointTable, (row.tenant, row.path), with_for_update=True)
            if present is None:
                session.add(CheckpointTable.of(row))
                return None
            if present.request_id == row.request_id:
                return None
            gone = present.expires_at is not None and present.expires_at <= self._clock()
            if not (overwrite or gone):
                raise CheckpointExists(
                    f"{row.path} exists: take another name, or say that it shall be replaced"
                )
            replaced = present.row()
            session.merge(CheckpointTable.of(row))
            return replaced

        return self._database.write(work)

    def get(self, tenant: str, path: str) -> CheckpointRow | None:
        return self._database.one(CheckpointTable, self._own(tenant, path))

    def readable(self, tenant: str, path: str) -> CheckpointRow | None:
        """Return the tenant's own checkpoint, or one that its owner made public."""
        own = self.get(tenant, path)
        if own is not None:
            return own
        public = (CheckpointTable.path == path, CheckpointTable.public.is_(True), self._alive())
        return self._database.one(CheckpointTable, *public)

    def anybodys(self, path: str) -> CheckpointRow | None:
        """Return a checkpoint of any tenant, for a user who may read the data folder anyway."""
        return self._database.one(CheckpointTable, CheckpointTable.path == path, self._alive())

    def of_model(self, tenant: str, model_id: str) -> list[CheckpointRow]:
        """Return a training run's checkpoints, in the order in which they were made."""
        own = (CheckpointTable.tenant == tenant, CheckpointTable.model_id == model_id)
        order = (CheckpointTable.created_at, CheckpointTable.path)
        return self._database.all(CheckpointTable, *own, self._alive(), order=order)

    def page(self, tenant: str, limit: int = 20, offset: int = 0) -> Page[CheckpointRow]:
        """Return a tenant's checkpoints, the newest first."""
        where = [CheckpointTable.tenant == tenant, self._alive()]
        order = (CheckpointTable.created_at.desc(), CheckpointTable.path)
        return self._database.page(CheckpointTable, *where, order=order, limit=limit, offset=offset)

    def delete(self, tenant: str, path: str) -> CheckpointRow | None:
        """Forget a checkpoint; return what it was (its folder may go), or None if there is none."""

        def work(session: OrmSession) -> CheckpointRow | None:
            query = select(CheckpointTable).where(self._own(tenant, path)).with_for_update()
            present = session.scalar(query)
            if present is None:
                return None
            session.delete(present)
            return present.row()

        return self._database.write(work)

    def drop(self, row: CheckpointRow) -> bool:
        """Forget exactly this checkpoint, not one that has taken its path since."""
        query = delete(CheckpointTable).where(
            CheckpointTable.tenant == row.tenant,
            CheckpointTable.path == row.path,
            CheckpointTable.request_id == row.request_id,
        )
        return self._database.change(query) > 0

    def set_ttl(self, tenant: str, path: str, seconds: float | None) -> CheckpointRow | None:
        """Have a checkpoint expire so many seconds from now; None = never. Return the checkpoint,
        or None if there is none."""
        expires_at = None if seconds is None else self._clock() + seconds
        query = update(CheckpointTable).where(self._own(tenant, path))
        self._database.change(query.values(expires_at=expires_at))
        return self.get(tenant, path)

    def set_public(self, tenant: str, path: str, public: bool) -> CheckpointRow | None:
        """Say whether other tenants may read a checkpoint; return it, or None if there is none."""
        query = update(CheckpointTable).where(self._own(tenant, path))
        self._database.change(query.values(public=public))
        return self.get(tenant, path)

    def expired(self, now: float | None = None) -> list[CheckpointRow]:
        """Return every tenant's checkpoints that are over: `drop` each, then remove its folder."""
        now = self._clock() if now is None else now
        order = (CheckpointTable.expires_at, CheckpointTable.path)
        return self._database.all(CheckpointTable, CheckpointTable.expires_at <= now, order=order)

    def bytes_of(self, tenant: str) -> int:
        """Return how many bytes a tenant's checkpoints take on the disk."""
        query = select(func.coalesce(func.sum(CheckpointTable.size_bytes), 0)).where(
            CheckpointTable.tenant == tenant, self._alive()
        )
        return self._database.read(lambda session: int(session.scalar(query) or 0))

    def _alive(self) -> ColumnElement[bool]:
        return CheckpointTable.expires_at.is_(None) | (CheckpointTable.expires_at > self._clock())

    def _own(self, tenant: str, path: str) -> ColumnElement[bool]:
        return (CheckpointTable.tenant == tenant) & (CheckpointTable.path == path) & self._alive()
