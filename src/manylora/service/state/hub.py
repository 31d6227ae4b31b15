"""The state behind the routes is composed: sessions, adapters, samplers, checkpoints and results.

Each has a file of its own; here is only what concerns several of them.
"""

import asyncio

from manylora.service.contract import Failed, Outcome, Waiting
from manylora.service.http_errors import Gone, ModelFault, NotFound
from manylora.service.state.archives import Archives
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.copies import Copies
from manylora.service.state.open_adapter import OpenAdapter
from manylora.service.state.open_adapters import OpenAdapters
from manylora.service.state.resources import Resources
from manylora.service.state.samplers import Samplers
from manylora.service.state.sessions import Session, Sessions
from manylora.service.state.submitted_runs import SubmittedRuns
from manylora.service.state.training import Training
from manylora.service.state.training_runs import TrainingRuns
from manylora.service.state.wire_operations import Operations
from manylora.service.wire.replies import ServerCapabilities, SupportedModel

# A tenant with more than this many batches queued is told that it waits for room.
MANY_BATCHES = 16


class TinkerHub:
    """A `TinkerHub` is a `contract.Hub` over one engine and one data directory."""

    def __init__(self, resources: Resources):
        self.resources = resources
        store, settings = resources.store, resources.settings
        self.checkpoints = Checkpoints(store, resources.folder, settings)
        self.sessions = Sessions(store, resources.clock, settings.quotas.sessions, self._finished)
        self.copies = Copies(resources, self.checkpoints, self.sessions)
        self.archives = Archives(resources, self.checkpoints)
        self.samplers = Samplers(resources, self.checkpoints, self.sessions)
        operations = Operations(resources, self.checkpoints, self.samplers.publish)
        self.adapters = OpenAdapters(resources, self.checkpoints, operations)
        self.runs = SubmittedRuns(resources, self.checkpoints, self.adapters)
        self.training_runs = TrainingRuns(store, self.checkpoints)
        self.training = Training(
            resources, self.sessions, self.checkpoints, self.samplers, self.adapters, self.runs
        )
        self._started_at = resources.wall()

    def ready(self) -> bool:
        """Return whether requests are taken."""
        return not self.resources.promises.closing

    async def capabilities(self, tenant: str) -> ServerCapabilities:
        """Return the base by every name that it is served under."""
        names, context = self.resources.base_names, self.resources.host.engine.base.context_length
        models = [SupportedModel(model_name=name, max_context_length=context) for name in names]
        return ServerCapabilities(supported_models=models)

    def _finished(self, session: Session) -> None:
        # What is queued still runs; the client need not wait for that.
        self.resources.in_background(self.close_adapters(session.tenant, session.id))

    async def close_adapters(self, tenant: str, session_id: str) -> None:
        """Free what a session that is over had open, once what is queued for it has run."""
        own = [adapter for adapter in self.adapters if adapter.row.session_id == session_id]
        await asyncio.gather(*(self.adapters.close(adapter) for adapter in own))
        await self.samplers.forget_session(tenant, session_id)

    # -- results ---------------------------------------------------

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        """Return an outcome; see `contract.Hub`."""
        promises = self.resources.promises
        outcome = await promises.outcome(tenant, request_id, timeout)
        if outcome is None and request_id in promises:  # it came just now
            outcome = await promises.outcome(tenant, request_id, timeout)
        if isinstance(outcome, Waiting):
            count, tokens = self.resources.host.waiting(tenant)
            if tokens > MANY_BATCHES * self.resources.settings.token_budget:
                reason = f"{count} of your operations, {tokens:,} tokens, wait for their turn"
                return Waiting("paused_capacity", reason)
        return await self._explained(tenant, request_id) if outcome is None else outcome

    async def _explained(self, tenant: str, request_id: str) -> Failed:
        """Return what the owner of a request with neither a promise nor a result is told.

        Most often there never was one. But what was acknowledged by an earlier server may have gone
        with a part of its journal: then its client must learn so, and its adapter must not go on as
        if nothing were.

        Raises:
            NotFound: there never was such a request, or it is another tenant's.
            Gone: it is so old that its result is.
        """
        owner, _, number = request_id.rpartition(":")
        adapter = self.adapters.peek(owner)
        if adapter is not None and adapter.tenant == tenant and number.isdecimal():
            return self._explained_by(adapter, request_id, int(number))
        try:
            sampler = await self.samplers.require(tenant, owner)
        except NotFound:
            raise _unknown(request_id) from None
        if sampler.created_at >= self._started_at:
            raise _unknown(request_id)
        return Failed(
            f"request {request_id!r} is not known any more: the time of its result is over, or it "
            "was lost with a part of the journal; ask again under another number",
            "server",
        )

    def _explained_by(self, adapter: OpenAdapter, request_id: str, seq: int) -> Failed:
        if adapter.fault is None:
            if seq < adapter.order.next_seq:
                raise Gone(f"the time of request {request_id!r} is over, and its result is gone")
            if not adapter.restored:
                raise _unknown(request_id)
            # Clients ask for what was acknowledged, and all of that is in order, or was lost.
            self.adapters.set_fault(adapter, f"operation {seq} was lost with a part of the journal")
            self.adapters.give_up(adapter)
        return Failed(str(ModelFault(adapter.fault)), "server")


def _unknown(request_id: str) -> NotFound:
    return NotFound(f"there is no request {request_id!r}, or its result's time is over")
