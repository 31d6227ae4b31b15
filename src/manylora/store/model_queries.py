"""Sessions make models (training runs) and samplers (sampling sessions)."""

from collections.abc import Iterable, Mapping
from functools import partial

from sqlalchemy import update
from sqlalchemy.orm import Session as OrmSession

from manylora.store.database import Queries, chunks
from manylora.store.records import ModelRow, Page, SamplerRow
from manylora.store.tables import ModelTable, Sampler
from manylora.types import Conflict


class ModelQueries(Queries):
    """Models are training runs. They are closed, never deleted: their checkpoints outlive them."""

    def create(self, row: ModelRow) -> ModelRow:
        """Make a model; the same request again gives the row that is there. Raises Conflict if the
        number in the session, or the id, is taken by another request."""
        number = ModelTable.model_seq_id == row.model_seq_id
        taken = (ModelTable.session_id == row.session_id) & number | (ModelTable.id == row.id)
        return self._database.make(ModelTable, row, taken, partial(_check_same, row))

    def get(self, tenant: str, id: str) -> ModelRow | None:
        return self._database.one(ModelTable, ModelTable.id == id, ModelTable.tenant == tenant)

    def page(self, tenant: str, limit: int = 20, offset: int = 0) -> Page[ModelRow]:
        """Return a tenant's models, the newest first."""
        order = (ModelTable.created_at.desc(), ModelTable.id)
        return self._database.page(
            ModelTable, ModelTable.tenant == tenant, order=order, limit=limit, offset=offset
        )

    def of_session(self, tenant: str, session_id: str) -> list[ModelRow]:
        where = [ModelTable.session_id == session_id, ModelTable.tenant == tenant]
        return self._database.all(ModelTable, *where, order=(ModelTable.model_seq_id,))

    def open(self) -> list[ModelRow]:
        """Return all tenants' models that are not closed, in the order of their creation."""
        where = [ModelTable.closed_at.is_(None)]
        return self._database.all(ModelTable, *where, order=(ModelTable.created_at, ModelTable.id))

    def touch(self, ids: Iterable[str], at: float | None = None) -> None:
        """Note that a request for each of them came."""
        at = self._clock() if at is None else at
        older = ModelTable.last_request_at < at
        for some in chunks(ids):
            query = update(ModelTable).where(ModelTable.id.in_(some), older)
            self._database.change(query.values(last_request_at=at))

    def set_steps(self, steps: Mapping[str, int]) -> None:
        """Set how many optimizer steps each of them made."""

        def work(session: OrmSession) -> None:
            for id, step in steps.items():
                session.execute(update(ModelTable).where(ModelTable.id == id).values(step=step))

        if steps:
            self._database.write(work)

    def close(self, tenant: str, id: str) -> bool:
        """Close a model; return False if there is none, or it was closed."""
        query = update(ModelTable).where(
            ModelTable.id == id, ModelTable.tenant == tenant, ModelTable.closed_at.is_(None)
        )
        return self._database.change(query.values(closed_at=self._clock())) > 0

    def set_fault(self, id: str, fault: str | None) -> None:
        """Set why it can no longer be used; None = it can again."""
        self._database.change(update(ModelTable).where(ModelTable.id == id).values(fault=fault))


class SamplerQueries(Queries):
    """Samplers are sampling sessions; a row says what one samples from."""

    def create(self, row: SamplerRow) -> SamplerRow:
        """Make a sampler; the same request again gives the row that is there. Raises Conflict if
        the number in the session, or the id, is taken by another request."""
        number = Sampler.seq_id == row.seq_id
        taken = (Sampler.session_id == row.session_id) & number | (Sampler.id == row.id)
        return self._database.make(Sampler, row, taken, partial(_check_same, row))

    def get(self, tenant: str, id: str) -> SamplerRow | None:
        return self._database.one(Sampler, Sampler.id == id, Sampler.tenant == tenant)

    def of_model(self, tenant: str, model_id: str) -> list[SamplerRow]:
        where = [Sampler.model_id == model_id, Sampler.tenant == tenant]
        return self._database.all(Sampler, *where, order=(Sampler.created_at, Sampler.id))

    def of_session(self, tenant: str, session_id: str) -> list[SamplerRow]:
        where = [Sampler.session_id == session_id, Sampler.tenant == tenant]
        return self._database.all(Sampler, *where, order=(Sampler.seq_id,))


def _check_same(wanted: ModelRow | SamplerRow, present: ModelRow | SamplerRow) -> None:
    if _request(present) != _request(wanted):
        raise Conflict(
            f"{wanted.id}: its number in the session was used by a request that said something else"
        )


def _request(row: ModelRow | SamplerRow) -> tuple[object, ...]:
    number = row.model_seq_id if isinstance(row, ModelRow) else row.seq_id
    return row.id, row.tenant, row.session_id, number, row.digest
