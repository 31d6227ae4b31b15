"""Rows that are over and of no more use go, and give their room on the disk back."""

from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, select
from sqlalchemy.orm import Session as OrmSession

from manylora.store.database import Queries, changed
from manylora.store.records import RunRow
from manylora.store.tables import CheckpointTable, ModelTable, RunTable, Sampler, SessionTable

ENDED = ("completed", "failed", "cancelled")


class Tidying(Queries):
    """`Tidying` counts what tenants have in the database, and finds what of it can go."""

    def count_sessions(self, tenant: str) -> int:
        """Count a tenant's sessions, open or over, but for those of which checkpoints are kept."""
        kept = exists().where(
            ModelTable.session_id == SessionTable.id, CheckpointTable.model_id == ModelTable.id
        )
        return self._count(SessionTable, tenant, ~kept)

    def count_samplers(self, tenant: str) -> int:
        """Count a tenant's sampling sessions."""
        return self._count(Sampler, tenant)

    def forget(self, empty_seconds: float, all_seconds: float) -> int:
        """Delete what is over; return how many rows went.

        Args:
            empty_seconds: sessions go so long after their end if nothing was made in them.
            all_seconds: so long after it go the other sessions, with their sampling sessions and
                with their models that are closed and have no checkpoint.
        """
        now = self._clock()

        def work(session: OrmSession) -> int:
            old = select(SessionTable.id).where(SessionTable.ended_at < now - all_seconds)
            unused = ~exists().where(CheckpointTable.model_id == ModelTable.id)
            submitted = exists().where(RunTable.model_id == ModelTable.id)
            sampled = exists().where(Sampler.model_id == ModelTable.id)
            empty = ~exists().where(ModelTable.session_id == SessionTable.id) & ~exists().where(
                Sampler.session_id == SessionTable.id
            )
            closed = ModelTable.session_id.in_(old) & ModelTable.closed_at.is_not(None)
            steps: list[tuple[Any, ColumnElement[bool]]] = [
                (Sampler, Sampler.session_id.in_(old)),
                (ModelTable, closed & unused & ~submitted & ~sampled),
                (SessionTable, (SessionTable.ended_at < now - empty_seconds) & empty),
            ]
            return sum(changed(session, delete(table).where(which)) for table, which in steps)

        gone = self._database.write(work)
        if gone:
            self._database.give_back()
        return gone

    def runs_beyond(self, kept: int) -> list[RunRow]:
        """Return runs that are over, of each tenant all but the newest so many."""
        number = func.row_number().over(
            partition_by=RunTable.tenant, order_by=(RunTable.created_at.desc(), RunTable.id)
        )
        ranked = (
            select(RunTable.id, number.label("number")).where(RunTable.status.in_(ENDED)).subquery()
        )
        old = select(ranked.c.id).where(ranked.c.number > kept)
        return self._database.all(
            RunTable, RunTable.id.in_(old), order=(RunTable.created_at, RunTable.id)
        )

    def _count(
        self, table: type[SessionTable] | type[Sampler], tenant: str, *where: ColumnElement[bool]
    ) -> int:
        query = select(func.count()).select_from(table).where(table.tenant == tenant, *where)
        return self._database.read(lambda session: session.scalar(query) or 0)
