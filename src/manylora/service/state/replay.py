"""A server starts with what was acknowledged before it stopped, and goes on with it."""

import asyncio
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from manylora.checkpoint import clean_strays
from manylora.hosting import Host
from manylora.journal import Damage, Record, Recovery
from manylora.service.http_errors import Lost
from manylora.service.state.hub import TinkerHub
from manylora.service.state.open_adapter import OpenAdapter
from manylora.service.state.open_adapters import FIRST_SEQ, GIVEN_UP, never_came
from manylora.service.state.samplers import KIND as SAMPLE
from manylora.service.state.training import created, creation_of
from manylora.service.state.wire_operations import Load, OperationRequest, adapter_spec
from manylora.service.wire.messages import KINDS, REFUSED, LoadWeightsRequest
from manylora.service.wire.outline import outline_of
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.sample_messages import read_sample
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import DataError, ManyloraError
from manylora.types.files import tell_shortage_apart

log = logging.getLogger("manylora.service")


class Replay:
    """A `Replay` brings a hub to where the last server of this data directory was."""

    def __init__(self, hub: TinkerHub, limits: WireLimits):
        self._hub = hub
        self._resources = hub.resources
        self._limits = limits

    async def run(self, recovery: Recovery) -> int:
        """Open what was open, and hand over what had not run; return how many operations."""
        store, hub = self._resources.store, self._hub
        snapshots: set[Path] = set()
        for session in await asyncio.to_thread(store.sessions.open):
            hub.sessions.restore(session)
            snapshots |= await hub.samplers.restore(session.tenant, session.id)
        await asyncio.to_thread(_remove_all_but, snapshots, self._resources.host)
        await self._open_adapters()
        count = await self._operations(recovery)
        for adapter in hub.adapters:
            await self._check_end(adapter)
        over = {m.row.session_id: m.tenant for m in hub.adapters}
        for session_id, tenant in over.items():
            if not hub.sessions.is_open(session_id):  # killed while it was closed
                self._resources.in_background(hub.close_adapters(tenant, session_id))
        return count

    async def _open_adapters(self) -> None:
        host, folder = self._resources.host, self._resources.host.state_folder("x").parent
        await asyncio.to_thread(clean_strays, folder)
        for row in await asyncio.to_thread(self._resources.store.models.open):
            position, fault = await asyncio.to_thread(saved_position, host.state_folder(row.id))
            adapter = self._hub.adapters.add(row, (position or 0) + 1, restored=True)
            if position is None and row.source_path is not None and fault is None:
                fault = "its state on disk is gone"
            if fault is not None:
                if adapter.fault is None:
                    self._hub.adapters.set_fault(adapter, fault)
                position = None
            spec = adapter_spec(row.spec, host.engine.sites)
            await asyncio.wrap_future(
                host.call(
                    row.id,
                    lambda pager, id=row.id, spec=spec, at=position: pager.register(id, spec, at),
                )
            )
            request_id, promises = creation_of(row.id), self._resources.promises
            if await asyncio.to_thread(promises.results.get, request_id) is None:
                promises.open(request_id, row.tenant, row.digest).durable.set_result(None)
                promises.settle(request_id, row, created)

    async def _operations(self, recovery: Recovery) -> int:
        by_adapter: dict[str, dict[int, Record]] = defaultdict(dict)
        samples: list[Record] = []
        for record in recovery.records:
            if record.kind == SAMPLE:
                samples.append(record)
            # One may be there twice; and what came after all was not given up.
            elif record.kind != GIVEN_UP or record.seq not in by_adapter[record.stream]:
                by_adapter[record.stream][record.seq] = record
        lost: dict[str, dict[int, Record]] = defaultdict(dict)
        for damage in recovery.damages:
            log.error("the journal is damaged: %s", _described(damage))
            if damage.lost is not None:
                lost[damage.lost.stream][damage.lost.seq] = damage.lost
        count = 0
        for model_id in {*by_adapter, *lost}:
            adapter = self._hub.adapters.peek(model_id)
            if adapter is not None:
                count += await self._of_adapter(adapter, by_adapter[model_id], lost[model_id])
            elif model_id in by_adapter:
                self._resources.journal.forget(model_id)
        # Their snapshots may be among what the adapters have to do again.
        for record in samples:
            count += await self._sample(record)
        for record in (record for records in lost.values() for record in records.values()):
            if record.kind == SAMPLE:
                await self._lose_sample(record)
        return count

    async def _of_adapter(
        self, adapter: OpenAdapter, own: Mapping[int, Record], lost: Mapping[int, Record]
    ) -> int:
        """Hand over an adapter's operations since its saved state; return how many."""
        self._resources.covered.append((adapter.id, adapter.order.next_seq - 1))
        missing, until, count = 0, 0, 0
        for seq, record in sorted({**lost, **own}.items()):
            if until and seq >= until:
                self._hub.adapters.give_up(adapter)
                until = 0
            if record.kind == GIVEN_UP:
                missing, until = seq, int(record.meta["until"])
                continue
            if seq < adapter.order.next_seq:
                continue
            request = await self._decoded(record)
            if until:
                request = OperationRequest(REFUSED, never_came(adapter.id, missing))
            if seq not in own:
                self._hub.adapters.set_fault(adapter, _lost_words(seq))
                request = OperationRequest(REFUSED, Lost(_lost_words(seq)))
            self._resources.waiting.take(adapter.tenant, request.body_bytes)
            adapter.order.remember(seq, record.digest)
            self._expect(record)
            self._hub.adapters.arrive(adapter, seq, request, replayed=True)
            count += 1
        if until:
            self._hub.adapters.give_up(adapter)
        return count

    async def _check_end(self, adapter: OpenAdapter) -> None:
        """Set a fault if operations were lost. One that has a result was there: if it is neither in
        the state nor in the journal, it was lost, and its client will not send it again."""
        if adapter.fault is not None:
            return
        seq, results = adapter.order.next_seq, self._resources.promises.results
        stateless = seq == FIRST_SEQ and adapter.row.step > 0
        if stateless or await asyncio.to_thread(results.get, f"{adapter.id}:{seq}") is not None:
            self._hub.adapters.set_fault(adapter, _lost_words(seq))
            self._hub.adapters.give_up(adapter)

    async def _sample(self, record: Record) -> bool:
        known = await asyncio.to_thread(self._resources.promises.results.get, record.request_id)
        if known is not None:
            self._resources.finished(record.request_id)
            return False
        self._expect(record)
        try:
            submit = await asyncio.to_thread(read_sample, record.body, self._limits)
            await self._hub.samplers.replay(record.tenant, submit, record.meta.get("snapshot"))
        except ManyloraError as error:
            self._resources.promises.settle(record.request_id, error, lambda _: ("", b""))
            self._resources.finished(record.request_id)
        return True

    async def _decoded(self, record: Record) -> OperationRequest:
        if record.kind == REFUSED.name or not record.body:
            return OperationRequest(REFUSED, DataError(record.body.decode()))
        kind = KINDS[record.kind]
        try:
            if kind.message is None:
                outline = await asyncio.to_thread(outline_of, record.body, self._limits)
                return OperationRequest(kind, outline, body_bytes=len(record.body))
            message = kind.message.model_validate_json(record.body)
            if isinstance(message, LoadWeightsRequest):
                path = TinkerPath.parse(message.path)
                checkpoint = await self._hub.checkpoints.readable(record.tenant, path, "weights")
                return OperationRequest(kind, Load(message, checkpoint))
            return OperationRequest(kind, message)
        except (ManyloraError, ValueError) as error:
            words = f"{record.request_id} cannot be repeated: {error}"
            return OperationRequest(REFUSED, DataError(words))

    def _expect(self, record: Record) -> None:
        promises = self._resources.promises
        promises.open(record.request_id, record.tenant, record.digest).durable.set_result(None)

    async def _lose_sample(self, record: Record) -> None:
        """Tell the client of a lost request, unless it has its result."""
        promises = self._resources.promises
        if await asyncio.to_thread(promises.results.get, record.request_id) is None:
            self._expect(record)
            words = f"request {record.request_id!r} was lost with a part of the journal"
            promises.settle(record.request_id, Lost(words), lambda _: ("", b""))
        self._resources.finished(record.request_id)


def _remove_all_but(snapshots: set[Path], host: Host) -> None:
    """Remove the snapshots of sessions that are over; a kill may have left some."""
    folder = host.snapshot_folder("x").parent
    clean_strays(folder)
    for path in folder.iterdir() if folder.exists() else ():
        if path not in snapshots:
            shutil.rmtree(path, ignore_errors=True)


def _lost_words(seq: int) -> str:
    return f"operation {seq} was lost with a part of the journal, or with its state on disk"


def _described(damage: Damage) -> str:
    what = "" if damage.lost is None else f"; {damage.lost.request_id} is lost"
    return f"{damage.segment} at byte {damage.offset}: {damage.reason}{what}"


def saved_position(folder: Path) -> tuple[int | None, str | None]:
    """Return a saved state's last operation number (None without one) and what is wrong with it.
    Raises TooManyFilesOpen."""
    if not folder.exists():
        return None, None
    try:
        settings = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return int(settings["client"]["seq"]), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        tell_shortage_apart(error, folder)
        return None, f"its state on disk cannot be read ({error})"
