"""A server's start: what was acknowledged before it stopped is there again, and goes on."""

import asyncio
import json
import logging
from collections import defaultdict
from pathlib import Path

from manylora.checkpoint import clean_strays
from manylora.scheduler import Record, Recovery
from manylora.service.hub import CREATION, TinkerHub
from manylora.service.operations import Request, adapter_spec
from manylora.service.samplers import KIND as SAMPLE
from manylora.service.wire import codec
from manylora.service.wire.limits import WireLimits
from manylora.service.wire.messages import (
    LoadWeightsRequest,
    OptimStepRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.replies import CreateModelReply
from manylora.service.wire.sampling import decode_sample
from manylora.types import DataError, ManyloraError

log = logging.getLogger("manylora.service")

_MESSAGES = {
    "optim_step": OptimStepRequest,
    "save_weights": SaveWeightsRequest,
    "save_weights_for_sampler": SaveWeightsForSamplerRequest,
    "save_weights_external": SaveWeightsExternalRequest,
}


class Replay:
    """Brings a hub to where the last server of this data directory was."""

    def __init__(self, hub: TinkerHub, limits: WireLimits):
        self._hub = hub
        self._parts = hub.parts
        self._limits = limits

    async def run(self, recovery: Recovery) -> int:
        """Open what was open, and hand over what had not run; returns how many operations."""
        store = self._parts.store
        for session in await asyncio.to_thread(store.sessions.open):
            self._hub.sessions.restore(session)
        await self._open_models()
        count = await self._operations(recovery)
        for model in self._hub.models:
            if not self._hub.sessions.is_open(model.row.session_id):
                self._parts.in_background(
                    self._hub.close_models(model.tenant, model.row.session_id)
                )
        for damage in recovery.damages:
            log.error("the journal is damaged: %s", damage)
        if recovery.damages:
            await self._fail_the_unfinished()
        return count

    async def _open_models(self) -> None:
        host, folder = self._parts.host, self._parts.host.pager.state_folder("x").parent
        await asyncio.to_thread(clean_strays, folder)
        for row in await asyncio.to_thread(self._parts.store.models.open):
            position, fault = await asyncio.to_thread(
                saved_position, host.pager.state_folder(row.id)
            )
            model = self._hub.models.add(row, (position or 0) + 1)
            if fault is not None:
                self._hub.models.set_fault(model, fault)
                position = None
            spec = adapter_spec(row.spec, host.engine.sites)
            await asyncio.wrap_future(
                host.call(
                    row.id,
                    lambda id=row.id, spec=spec, at=position: host.pager.register(id, spec, at),
                )
            )
            created = f"{row.id}:{CREATION}"
            if await asyncio.to_thread(self._parts.promises.results.get, created) is None:
                reply = CreateModelReply(model_id=row.id).model_dump_json().encode()
                promise = self._parts.promises.open(created, row.tenant, row.digest)
                promise.durable.set_result(None)
                self._parts.promises.settle(created, reply, lambda body: ("application/json", body))

    async def _operations(self, recovery: Recovery) -> int:
        by_model: dict[str, list[Record]] = defaultdict(list)
        count = 0
        for record in recovery.records:
            if record.kind == SAMPLE:
                count += await self._sample(record)
            else:
                by_model[record.stream].append(record)
        for model_id, records in by_model.items():
            model = self._hub.models.peek(model_id)
            if model is None:
                self._parts.journal.forget(model_id)
                continue
            self._parts.covered.append((model_id, model.order.next_seq - 1))
            # A record may be there twice.
            own = {record.seq: record for record in records}
            for _, record in sorted(own.items()):
                if record.seq < model.order.next_seq:
                    continue
                request = await self._decoded(record)
                model.order.remember(record.seq, record.digest)
                promise = self._parts.promises.open(record.request_id, record.tenant, record.digest)
                promise.durable.set_result(None)
                self._parts.enter(record.tenant, 0)
                self._hub.models.arrive(model, record.seq, request, replayed=True)
                count += 1
        return count

    async def _sample(self, record: Record) -> bool:
        known = await asyncio.to_thread(self._parts.promises.results.get, record.request_id)
        if known is not None:
            self._parts.finished(record.request_id)
            return False
        promise = self._parts.promises.open(record.request_id, record.tenant, record.digest)
        promise.durable.set_result(None)
        try:
            submit = await asyncio.to_thread(decode_sample, record.body, self._limits)
            await self._hub.samplers.replay(record.tenant, submit)
        except ManyloraError as error:
            self._parts.promises.settle(record.request_id, error, lambda _: ("", b""))
            self._parts.finished(record.request_id)
        return True

    async def _decoded(self, record: Record) -> Request:
        if record.kind == "refused":
            return Request("refused", DataError(record.body.decode()))
        try:
            if record.kind == "forward_backward":
                submit = await asyncio.to_thread(
                    codec.decode_forward_backward, record.body, self._limits
                )
                return Request(record.kind, submit)
            if record.kind == "load_weights":
                asked = LoadWeightsRequest.model_validate_json(record.body)
                path = TinkerPath.parse(asked.path)
                checkpoint = await self._hub.keeping.readable(record.tenant, path, "weights")
                return Request(record.kind, (asked, checkpoint))
            return Request(record.kind, _MESSAGES[record.kind].model_validate_json(record.body))
        except (ManyloraError, ValueError) as error:
            return Request("refused", DataError(f"{record.request_id} cannot be repeated: {error}"))

    async def _fail_the_unfinished(self) -> None:
        """Where the journal lost something, a gap will not fill: say so at once."""
        for model in self._hub.models:
            if model.order.num_early:
                self._hub.models.set_fault(
                    model, f"operation {model.order.next_seq} was lost with a part of the journal"
                )
                self._hub.models.give_up(model)


def saved_position(folder: Path) -> tuple[int | None, str | None]:
    """The number of the last operation in a state on disk (None without one), and what is wrong
    with it."""
    if not folder.exists():
        return None, None
    try:
        settings = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return int(settings["client"]["seq"]), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"its state on disk cannot be read ({error})"
