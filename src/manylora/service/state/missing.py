"""What to say of a request that has neither a promise nor a result.

Most often there never was one. But what was acknowledged by an earlier server may have gone with a
part of its journal: then its client must learn so, and its model must not go on as if nothing were.
"""

from manylora.service.contract import Failed
from manylora.service.http_errors import Gone, ModelFault, NotFound
from manylora.service.state.open_adapter import OpenAdapter
from manylora.service.state.open_adapters import OpenAdapters
from manylora.service.state.samplers import Samplers


class Missing:
    """Tells lost requests from those that never were."""

    def __init__(self, models: OpenAdapters, samplers: Samplers, started_at: float):
        """`started_at`: of this server, in unix seconds."""
        self._models = models
        self._samplers = samplers
        self._started_at = started_at

    async def explain(self, tenant: str, request_id: str) -> Failed:
        """What the owner of a request is told.

        Raises:
            NotFound: there never was such a request, or it is another tenant's.
            Gone: it is so old that its result is.
        """
        owner, _, number = request_id.rpartition(":")
        model = self._models.peek(owner)
        if model is not None and model.tenant == tenant and number.isdecimal():
            return self._of_model(model, request_id, int(number))
        try:
            sampler = await self._samplers.require(tenant, owner)
        except NotFound:
            raise _unknown(request_id) from None
        if sampler.created_at >= self._started_at:
            raise _unknown(request_id)
        return Failed(
            f"request {request_id!r} is not known any more: the time of its result is over, or it "
            "was lost with a part of the journal; ask again under another number",
            "server",
        )

    def _of_model(self, model: OpenAdapter, request_id: str, seq: int) -> Failed:
        if model.fault is None:
            if seq < model.order.next_seq:
                raise Gone(f"the time of request {request_id!r} is over, and its result is gone")
            if not model.restored:
                raise _unknown(request_id)
            # Clients ask for what was acknowledged, and all of that is in order, or was lost.
            self._models.set_fault(model, f"operation {seq} was lost with a part of the journal")
            self._models.give_up(model)
        return Failed(str(ModelFault(model.fault)), "server")


def _unknown(request_id: str) -> NotFound:
    return NotFound(f"there is no request {request_id!r}, or its result's time is over")
