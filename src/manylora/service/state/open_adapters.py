"""Each open adapter has its client's operations in order.

What an operation does is in `wire_operations.py`; here is when: after every operation with a lower
number, once, and for the tenant that owns the adapter.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from manylora.journal import Record
from manylora.service.http_errors import Backpressure, Gone, ModelFault, missing
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.in_order import InOrder
from manylora.service.state.open_adapter import OpenAdapter, Turn
from manylora.service.state.resources import Resources
from manylora.service.state.wire_operations import OperationRequest, Operations, snapshot_made_by
from manylora.service.wire.messages import REFUSED
from manylora.service.wire.outline import Outline
from manylora.service.wire.replies import Submitted
from manylora.service.wire.run_messages import Adapter, AdapterList
from manylora.store import ModelRow
from manylora.types import Cancelled, CheckpointDamaged, DataError, ManyloraError

log = logging.getLogger("manylora.service")

# What is smaller, and becomes no larger, is decoded at once; the rest in so many threads.
INLINE = 64 * 1024
DECODERS = 4
# Operations of one adapter that may wait for a gap in their numbers to fill.
MOST_EARLY = 4096
FIRST_SEQ = 1
# The journal's word for operations that wait for one that will not come; `seq` is that one.
GIVEN_UP = "given_up"


class OpenAdapters:
    """`OpenAdapters` are all those of a server."""

    def __init__(self, resources: Resources, checkpoints: Checkpoints, operations: Operations):
        self._resources = resources
        self._checkpoints = checkpoints
        self._operations = operations
        self._open: dict[str, OpenAdapter] = {}
        self._decoding = asyncio.Semaphore(DECODERS)

    def __iter__(self) -> Iterator[OpenAdapter]:
        return iter(list(self._open.values()))

    def count(self, tenant: str) -> int:
        """Return how many open adapters a tenant has."""
        return sum(m.tenant == tenant and not m.closing for m in self._open.values())

    def add(
        self, row: ModelRow, next_seq: int = FIRST_SEQ, *, restored: bool = False
    ) -> OpenAdapter:
        """Open an adapter whose row is in the database."""
        now = self._resources.clock()
        adapter = OpenAdapter(
            row, InOrder(next_seq), restored, steps=row.step, saved_at=now, arrived_at=now,
            fault=row.fault,
        )  # fmt: skip
        self._open[row.id] = adapter
        return adapter

    def is_open(self, model_id: str) -> bool:
        """Return whether the adapter takes operations."""
        return model_id in self._open

    def peek(self, model_id: str) -> OpenAdapter | None:
        """Return the open adapter of that id, of any tenant."""
        return self._open.get(model_id)

    async def require(self, tenant: str, model_id: str) -> OpenAdapter:
        """Return the tenant's open adapter of that id. Raises NotFound: the tenant has none; Gone:
        it is closed."""
        adapter = self._open.get(model_id)
        if adapter is not None and adapter.tenant == tenant:
            if adapter.closing:
                raise Gone(f"model {model_id!r} is closed, since its session is over")
            return adapter
        if adapter is None:
            row = await asyncio.to_thread(self._resources.store.models.get, tenant, model_id)
            if row is not None:
                raise Gone(
                    f"model {model_id!r} is closed, since its session is over; its checkpoints stay"
                )
        raise missing("model")

    # -- as their owners see them ---------------------------------------------------

    async def page(self, tenant: str) -> AdapterList:
        """Return a tenant's open adapters."""
        return AdapterList(adapters=[one.info() for one in self if one.tenant == tenant])

    async def get(self, tenant: str, id: str) -> Adapter:
        """Return one open adapter. See `require`."""
        return (await self.require(tenant, id)).info()

    async def end(self, tenant: str, id: str) -> Adapter:
        """Close an adapter after what is queued for it. What it has learned since it was last saved
        is kept as its checkpoint `last`. See `require` and `keep_last`."""
        adapter = await self.require(tenant, id)
        if adapter.fault is None:
            await self.keep_last(adapter)
        await self.close(adapter)
        return adapter.info()

    # -- operations ---------------------------------------------------

    async def submit(
        self,
        tenant: str,
        model_id: str,
        seq: int,
        request: OperationRequest,
        body: bytes,
        digest: str,
    ) -> Submitted:
        """Take an operation: durable when this returns, run when its turn comes.

        Raises:
            NotFound, Gone: no such open adapter.
            DataError: its number was used for another request.
            Backpressure: too much waits already.
            TooLarge: it is more than can ever wait.
            SaveFailed: it could not be made durable.
        """
        adapter = await self.require(tenant, model_id)
        reply = Submitted(request_id=f"{model_id}:{seq}", model_id=model_id)
        if seq < FIRST_SEQ:
            raise DataError(f"seq_id is {seq}; the first one of a model is {FIRST_SEQ}")
        if adapter.order.is_repeated(seq, digest):
            return reply
        if adapter.order.num_early >= MOST_EARLY:
            raise Backpressure(
                f"{MOST_EARLY} operations of {model_id!r} wait for number {adapter.order.next_seq}"
            )
        request = replace(request, body_bytes=len(body))
        self._resources.count_in(request.held_by(tenant))
        try:
            if isinstance(request.content, Outline):
                request = await self._prepared(adapter, request)
            id, kind = reply.request_id, request.kind.name
            record = Record(model_id, seq, kind, tenant, id, digest, body)
            new = await self._resources.accept(record)
        except BaseException:
            self._resources.count_out(request.held_by(tenant))
            raise
        if new:
            adapter.order.remember(seq, digest)
            self.arrive(adapter, seq, request)
        else:
            self._resources.count_out(request.held_by(tenant))
        return reply

    async def refuse(self, tenant: str, model_id: str, seq: int, error: ManyloraError) -> None:
        """Use up the number of a refused request, if the tenant has such an adapter. Later ones
        would wait for it."""
        adapter = self._open.get(model_id)
        if adapter is None or adapter.tenant != tenant or adapter.closing or seq < FIRST_SEQ:
            return
        request = OperationRequest(REFUSED, error)
        with suppress(DataError):  # the number was used before
            await self.submit(tenant, model_id, seq, request, str(error).encode(), "refused")

    def arrive(
        self, adapter: OpenAdapter, seq: int, request: OperationRequest, *, replayed: bool = False
    ) -> None:
        """Put a durable operation in its place, and run what is due."""
        adapter.arrived_at = self._resources.clock()
        snapshot = snapshot_made_by(adapter.row, request)
        if snapshot is not None:
            self._resources.coming.expect(snapshot)
        for due, waiting in adapter.order.offer(seq, request):
            self._next(adapter, Turn(due, waiting, replayed))
        if adapter.fault is not None:
            self.give_up(adapter)

    def give_up(self, adapter: OpenAdapter) -> None:
        """Fail the operations that wait for one that never came."""
        absent = adapter.order.next_seq
        for seq, request in adapter.order.give_up():
            self._next(adapter, Turn(seq, request, refusal=never_came(adapter.id, absent)))

    async def close_gap(self, adapter: OpenAdapter) -> None:
        """Give up in a way that a restart repeats. Raises SaveFailed."""
        absent, last = adapter.order.next_seq, max(seq for seq, _ in adapter.order.early())
        id, until = f"{adapter.id}:{absent}", {"until": last + 1}
        record = Record(adapter.id, absent, GIVEN_UP, adapter.tenant, id, "", b"", until)
        await asyncio.wrap_future(self._resources.journal.append(record))
        if adapter.order.next_seq == absent:
            self.give_up(adapter)

    def save(self, adapter: OpenAdapter) -> None:
        """Have the adapter's state written as of the operations that were handed over."""
        adapter.unsaved_steps, adapter.touched, adapter.saved_at = 0, False, self._resources.clock()
        host, id = self._resources.host, adapter.id
        with suppress(Cancelled):  # the engine is gone, or the server stops: the journal has it
            host.call(id, lambda pager: pager.save(id), tenant=adapter.tenant)

    async def keep_last(self, adapter: OpenAdapter) -> None:
        """Write an adapter's state as its checkpoint `last`, unless a checkpoint has it already.
        Raises SaveFailed, QuotaExceeded."""
        saved = await self._checkpoints.of_model(adapter.tenant, adapter.id)
        steps = [row.step for row in saved if row.kind == "weights"]
        if not adapter.steps or adapter.steps in steps:
            return
        await self._fed(adapter)
        await asyncio.wrap_future(self._operations.keep_last(adapter.row))

    async def close(self, adapter: OpenAdapter) -> None:
        """Take no more operations; what was handed over still runs, then the adapter is freed."""
        adapter.closing = True
        self.give_up(adapter)
        await self._fed(adapter)
        host, id = self._resources.host, adapter.id
        freed = host.unload(id, tenant=adapter.tenant)
        with suppress(Cancelled):
            await asyncio.wrap_future(freed)
        if self._resources.promises.closing:
            return  # what was queued has not run: the next start does all this again
        await asyncio.to_thread(self._resources.store.models.close, adapter.tenant, adapter.id)
        await asyncio.to_thread(self._resources.journal.forget, adapter.id)
        self._open.pop(adapter.id, None)

    # -- inside ---------------------------------------------------

    async def _prepared(self, adapter: OpenAdapter, request: OperationRequest) -> OperationRequest:
        """Decode a forward_backward whose turn it is, if there is room; else return it as it came.
        What is wrong with it uses its number up."""
        outline: Outline = request.content
        try:
            decoded, size = self._resources.decoded, outline.decoded_bytes
            decoded.check(size)
            its_turn = outline.seq_id == adapter.order.next_seq and not adapter.due
            if not its_turn or not decoded.fits(adapter.tenant, size):
                return request
            decoded.take(adapter.tenant, size)
            try:
                return await self._decoded(request)
            except BaseException:
                decoded.leave(adapter.tenant, size)
                raise
        except ManyloraError as error:
            await self.refuse(adapter.tenant, adapter.id, outline.seq_id, error)
            raise

    async def _decoded(self, request: OperationRequest) -> OperationRequest:
        """Return a request with its tensors; their bytes have been counted in."""
        outline: Outline = request.content
        if max(outline.decoded_bytes, len(outline.body)) <= INLINE:
            content = outline.decode()
        else:
            async with self._decoding:
                content = await asyncio.to_thread(outline.decode)
        return replace(request, content=content, decoded_bytes=outline.decoded_bytes)

    def _next(self, adapter: OpenAdapter, turn: Turn) -> None:
        """Hand the operation to the queue whose turn it is, behind those that are due before."""
        adapter.running += 1
        if not adapter.due and not self._is_packed(adapter, turn):
            self._run(adapter, turn)
            return
        adapter.due.append(turn)
        if adapter.feeding is None:
            adapter.feeding = self._resources.in_background(self._feed(adapter))

    async def _feed(self, adapter: OpenAdapter) -> None:
        """Decode and hand over what is due, as fast as there is room."""
        try:
            while adapter.due and not self._resources.promises.closing:
                if self._is_packed(adapter, adapter.due[0]):
                    await self._unpack(adapter, adapter.due[0])
                else:
                    self._run(adapter, adapter.due.popleft())
        except Cancelled:
            pass  # the server stops; it is in the journal
        finally:
            adapter.running -= len(adapter.due)
            adapter.feeding = None

    async def _unpack(self, adapter: OpenAdapter, turn: Turn) -> None:
        size = turn.request.content.decoded_bytes
        await self._resources.decoded.enter_in_turn(adapter.tenant, size)
        try:
            turn.request = await self._decoded(turn.request)
        except BaseException as error:
            self._resources.decoded.leave(adapter.tenant, size)
            if not isinstance(error, ManyloraError):
                raise
            turn.refusal = error

    async def _fed(self, adapter: OpenAdapter) -> None:
        """Wait until everything that is due has been handed over, or the server stops."""
        if adapter.feeding is not None:
            await asyncio.wait([adapter.feeding])

    def _is_packed(self, adapter: OpenAdapter, turn: Turn) -> bool:
        """Return whether an operation has to be decoded before it can run."""
        if not isinstance(turn.request.content, Outline) or turn.refusal is not None:
            return False
        if adapter.fault is not None:
            return False
        known = turn.replayed and turn.request.leaves_no_trace
        return not (known and self._operations.is_known(f"{adapter.id}:{turn.seq}"))

    def _run(self, adapter: OpenAdapter, turn: Turn) -> None:
        """Hand an operation to the queue; with a `refusal`, one that fails so."""
        seq, request, refusal = turn.seq, turn.request, turn.refusal
        request_id = f"{adapter.id}:{seq}"
        then = partial(self._done, adapter, seq, request)
        if self._resources.suspects.is_numbered_given_up(adapter.id, seq) and adapter.fault is None:
            self.set_fault(adapter, f"operation {seq} was running each time the engine broke down")
        if adapter.fault is not None:
            refusal = ModelFault(adapter.fault)
        if refusal is not None:
            request = replace(request, kind=REFUSED, content=refusal)
        future, encode = self._operations.run(adapter.row, seq, request, replayed=turn.replayed)
        self._resources.promises.follow(request_id, future, encode, then)

    def _done(
        self, adapter: OpenAdapter, seq: int, request: OperationRequest, error: BaseException | None
    ) -> None:
        adapter.running -= 1
        adapter.touched = True
        self._resources.count_out(request.held_by(adapter.tenant))
        if error is None:
            self._resources.suspects.acquit_numbered(adapter.id, seq)
        snapshot = snapshot_made_by(adapter.row, request)
        if snapshot is not None:
            self._resources.coming.arrived(snapshot)
        if adapter.fault is not None:  # it would fail again, so the journal need not remember it
            self._resources.covered.append((adapter.id, seq))
        elif isinstance(error, CheckpointDamaged) and request.kind.trains:
            self.set_fault(adapter, f"its state on disk is damaged ({error})")
        if request.kind.name != "optim_step":
            return
        if error is None:
            adapter.steps += 1
            adapter.unsaved_steps += 1
            if adapter.unsaved_steps >= self._resources.settings.saving.every_steps:
                self.save(adapter)
        elif not isinstance(error, ManyloraError) and adapter.fault is None:
            self.set_fault(adapter, f"an optimizer step broke off: {error}")

    def set_fault(self, adapter: OpenAdapter, fault: str) -> None:
        """Have every operation of the adapter fail with these words from now on."""
        log.error("model %s can no longer be used: %s", adapter.id, fault)
        adapter.fault = (
            f"model {adapter.id!r} can no longer be used: {fault}; load a checkpoint of it"
        )
        self._resources.in_background(
            asyncio.to_thread(self._resources.store.models.set_fault, adapter.id, adapter.fault)
        )


def never_came(model_id: str, seq: int) -> DataError:
    """Return the error of operations that waited for that one."""
    return DataError(f"operation {seq} of model {model_id!r} never arrived, so this one cannot run")


def seed_of(model_id: str) -> int:
    """Return a seed for an adapter whose client gave none; the same after a restart."""
    return int.from_bytes(hashlib.sha256(model_id.encode()).digest()[:4], "big")
