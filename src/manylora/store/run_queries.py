"""Run files are submitted to the server, and each has a row."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.orm import Session as OrmSession

from manylora.store.database import Database
from manylora.store.records import Json, Page, RunRow
from manylora.store.tables import RunTable
from manylora.types import Conflict


class RunQueries:
    """These queries are on what was submitted, and what became of it."""

    def __init__(self, database: Database, clock: Callable[[], float]):
        self._database = database
        self._clock = clock

    def create(self, row: RunRow) -> RunRow:
        """Add a run. Raises Conflict if the id is taken."""

        def work(session: OrmSession) -> RunRow:
            if session.get(RunTable, row.id) is not None:
                raise Conflict(f"run {row.id} exists")
            session.add(RunTable.of(row))
            return row

        return self._database.write(work)

    def get(self, tenant: str, id: str) -> RunRow | None:
        return self._database.one(RunTable, RunTable.id == id, RunTable.tenant == tenant)

    def page(self, tenant: str, limit: int = 20, offset: int = 0) -> Page[RunRow]:
        """Return a tenant's runs, the newest first."""
        order = (RunTable.created_at.desc(), RunTable.id)
        return self._database.page(
            RunTable, RunTable.tenant == tenant, order=order, limit=limit, offset=offset
        )

    def with_status(self, *statuses: str) -> list[RunRow]:
        """Return all tenants' runs of these statuses, in the order of their creation."""
        where = [RunTable.status.in_(statuses)]
        return self._database.all(RunTable, *where, order=(RunTable.created_at, RunTable.id))

    def update(
        self,
        tenant: str,
        id: str,
        *,
        status: str | None = None,
        error: str | None = None,
        progress: Json | None = None,
        model_id: str | None = None,
    ) -> RunRow | None:
        """Change what is given.

        Returns:
            the run; None if there is none.
        """
        given: dict[str, Any] = {
            "status": status,
            "error": error,
            "progress": progress,
            "model_id": model_id,
        }
        values = {name: value for name, value in given.items() if value is not None}
        query = update(RunTable).where(RunTable.id == id, RunTable.tenant == tenant)
        self._database.change(query.values(updated_at=self._clock(), **values))
        return self.get(tenant, id)

    def delete(self, tenant: str, id: str) -> bool:
        """Delete a run; return False if there is none."""
        return (
            self._database.change(
                delete(RunTable).where(RunTable.id == id, RunTable.tenant == tenant)
            )
            > 0
        )
