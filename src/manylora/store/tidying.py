"""What is over and of no use to anybody goes, and gives its room on the disk back."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, select
from sqlalchemy.orm import Session as OrmSession

from manylora.store.database import Database
from manylora.store.rows import RunRow
from manylora.store.tables import Checkpoint, Model, Run, Sampler, Session

ENDED = ("completed", "failed", "cancelled")


class Tidying:
    """How much tenants have in the database, and what of it can go."""

    def __init__(self, database: Database, clock: Callable[[], float]):
        self._database = database
        self._clock = clock

    def count_sessions(self, tenant: str) -> int:
        """Sessions of a tenant, open or over, but for those of which checkpoints are kept."""
        kept = exists().where(Model.session_id == Session.id, Checkpoint.model_id == Model.id)
        return self._count(Session, tenant, ~kept)

    def count_samplers(self, tenant: str) -> int:
        """Sampling sessions of a tenant."""
        return self._count(Sampler, tenant)

    def forget(self, empty_seconds: float, all_seconds: float) -> int:
        """Delete what is over.

        Args:
            empty_seconds: sessions go so long after their end if nothing was made in them.
            all_seconds: so long after it go the other sessions, with their sampling sessions and
                with their models that are closed and have no checkpoint.

        Returns:
            how many rows went.
        """
        now = self._clock()

        def work(session: OrmSession) -> int:
            old = select(Session.id).where(Session.ended_at < now - all_seconds)
            unused = ~exists().where(Checkpoint.model_id == Model.id)
            submitted = exists().where(Run.model_id == Model.id)
            sampled = exists().where(Sampler.model_id == Model.id)
            empty = ~exists().where(Model.session_id == Session.id) & ~exists().where(
                Sampler.session_id == Session.id
            )
            steps: list[tuple[Any, ColumnElement[bool]]] = [
                (Sampler, Sampler.session_id.in_(old)),
                (
                    Model,
                    Model.session_id.in_(old) & Model.closed_at.is_not(None)
                    & unused & ~submitted & ~sampled,
                ),
                (Session, (Session.ended_at < now - empty_seconds) & empty),
            ]  # fmt: skip
            gone = 0
            for table, which in steps:
                statement = delete(table).where(which)
                done: Any = session.execute(statement.execution_options(synchronize_session=False))
                gone += int(done.rowcount)
            return gone

        gone = self._database.write(work)
        if gone:
            self._database.give_back()
        return gone

    def runs_beyond(self, kept: int) -> list[RunRow]:
        """Runs that are over, of each tenant all but the newest so many."""
        number = func.row_number().over(
            partition_by=Run.tenant, order_by=(Run.created_at.desc(), Run.id)
        )
        ranked = select(Run.id, number.label("number")).where(Run.status.in_(ENDED)).subquery()
        old = select(ranked.c.id).where(ranked.c.number > kept)
        return self._database.all(Run, Run.id.in_(old), order=(Run.created_at, Run.id))

    def _count(
        self, table: type[Session] | type[Sampler], tenant: str, *where: ColumnElement[bool]
    ) -> int:
        query = select(func.count()).select_from(table).where(table.tenant == tenant, *where)
        return self._database.read(lambda session: session.scalar(query) or 0)
