"""Run files are submitted to the server, and each has a row."""

from sqlalchemy import delete, update

from manylora.store.database import Queries
from manylora.store.records import Json, Page, RunRow
from manylora.store.tables import RunTable
from manylora.types import Conflict


class RunQueries(Queries):
    """These queries are on what was submitted, and what became of it."""

    def create(self, row: RunRow) -> RunRow:
        """Add a run. Raises Conflict if the id is taken."""

        def refuse(present: RunRow) -> None:
            raise Conflict(f"run {row.id} exists")

        return self._database.make(RunTable, row, RunTable.id == row.id, refuse)

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
        """Change what is given; return the run, or None if there is none."""
        given = {"status": status, "error": error, "progress": progress, "model_id": model_id}
        values = {name: value for name, value in given.items() if value is not None}
        query = update(RunTable).where(RunTable.id == id, RunTable.tenant == tenant)
        self._database.change(query.values(updated_at=self._clock(), **values))
        return self.get(tenant, id)

    def delete(self, tenant: str, id: str) -> bool:
        """Delete a run; return False if there is none."""
        query = delete(RunTable).where(RunTable.id == id, RunTable.tenant == tenant)
        return self._database.change(query) > 0
