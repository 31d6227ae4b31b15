"""The half of the hub behind the plain API: submitted runs, and the adapters that are open."""

from manylora.service.http_errors import QuotaExceeded
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.open_adapter import OpenAdapter
from manylora.service.state.open_adapters import OpenAdapters
from manylora.service.state.resources import Resources
from manylora.service.state.submitted_runs import SubmittedRuns
from manylora.service.wire.run_messages import (
    Adapter,
    AdapterList,
    Run,
    RunList,
    SubmitRunRequest,
)
from manylora.types import DataError


class Plain:
    """See `contract.Hub`."""

    parts: Resources
    keeping: Checkpoints
    models: OpenAdapters
    submitted: SubmittedRuns

    async def submit_run(self, tenant: str, request: SubmitRunRequest) -> Run:
        if request.base_model is not None:
            self.check_base(request.base_model)
        self.check_adapters(tenant)
        return await self.submitted.submit(tenant, request)

    async def runs(self, tenant: str, limit: int, offset: int) -> RunList:
        return await self.submitted.page(tenant, limit, offset)

    async def run(self, tenant: str, run_id: str, after: int) -> Run:
        return await self.submitted.get(tenant, run_id, after)

    async def cancel_run(self, tenant: str, run_id: str) -> Run:
        return await self.submitted.cancel(tenant, run_id)

    async def adapters(self, tenant: str) -> AdapterList:
        return AdapterList(adapters=[m.info() for m in self.models if m.tenant == tenant])

    async def adapter(self, tenant: str, adapter_id: str) -> Adapter:
        return (await self.models.require(tenant, adapter_id)).info()

    async def close_adapter(self, tenant: str, adapter_id: str) -> Adapter:
        model = await self.models.require(tenant, adapter_id)
        if model.fault is None:
            await self.keep_last(model)
        await self.models.close(model)
        return model.info()

    async def keep_last(self, model: OpenAdapter) -> None:
        """Write what a model has learned since it was last saved as its checkpoint `last`."""
        saved = await self.keeping.of_model(model.tenant, model.id)
        steps = [row.step for row in saved if row.kind == "weights"]
        if not model.steps or model.steps in steps:
            return
        await self.models.keep_last(model)

    def check_base(self, name: str) -> None:
        """Raises DataError: the server has another base."""
        names = self.parts.base_names
        if name not in names:
            raise DataError(f"base_model is {name!r}; this server's is {' or '.join(names)}")

    def check_adapters(self, tenant: str) -> None:
        """Raises QuotaExceeded: the tenant has all the adapters that it may."""
        quota = self.parts.settings.quotas.adapters
        if self.models.count(tenant) + self.submitted.count(tenant) >= quota:
            raise QuotaExceeded(
                f"you have {quota} adapters open, which is all that you may: finish a session or a "
                "run, or let one end"
            )
