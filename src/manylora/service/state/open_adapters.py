"""Models: one adapter each, with its client's operations in order.

What an operation does is in `operations.py`; here is when: after every operation with a lower
number, once, and for the tenant that owns the model.
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
from manylora.service.state.in_order import InOrder
from manylora.service.state.open_adapter import OpenAdapter, Turn
from manylora.service.state.resources import Resources
from manylora.service.state.wire_operations import (
    OperationRequest,
    Operations,
    leaves_no_trace,
    snapshot_made_by,
)
from manylora.service.wire.outline import Outline
from manylora.service.wire.replies import Submitted
from manylora.store import ModelRow
from manylora.types import Cancelled, CheckpointDamaged, DataError, ManyloraError

log = logging.getLogger("manylora.service")

# What is smaller, and becomes no larger, is decoded at once; the rest in so many threads.
INLINE = 64 * 1024
DECODERS = 4
# Operations of one model that may wait for a gap in their numbers to fill.
MOST_EARLY = 4096
FIRST_SEQ = 1
# The journal's word for operations that wait for one that will not come; `seq` is that one.
GIVEN_UP = "given_up"
# Kinds that fail only because of what the model is, if its state cannot be read.
TRAINING = frozenset({"forward_backward", "optim_step"})


class OpenAdapters:
    """The open models of a server."""

    def __init__(self, parts: Resources, operations: Operations):
        self._parts = parts
        self._operations = operations
        self._open: dict[str, OpenAdapter] = {}
        self._decoding = asyncio.Semaphore(DECODERS)

    def __iter__(self) -> Iterator[OpenAdapter]:
        return iter(list(self._open.values()))

    def count(self, tenant: str) -> int:
        """Open models of a tenant."""
        return sum(m.tenant == tenant and not m.closing for m in self._open.values())

    def add(
        self, row: ModelRow, next_seq: int = FIRST_SEQ, *, restored: bool = False
    ) -> OpenAdapter:
        """Open a model whose row is in the database."""
        now = self._parts.clock()
        model = OpenAdapter(
            row, InOrder(next_seq), restored, steps=row.step, saved_at=now, arrived_at=now,
            fault=row.fault,
        )  # fmt: skip
        self._open[row.id] = model
        return model

    def is_open(self, model_id: str) -> bool:
        """Whether the model takes operations."""
        return model_id in self._open

    def peek(self, model_id: str) -> OpenAdapter | None:
        """The open model of that id, whoever owns it."""
        return self._open.get(model_id)

    async def require(self, tenant: str, model_id: str) -> OpenAdapter:
        """The tenant's open model of that id.

        Raises:
            NotFound: the tenant has none. Gone: it is closed.
        """
        model = self._open.get(model_id)
        if model is not None and model.tenant == tenant:
            if model.closing:
                raise Gone(f"model {model_id!r} is closed, since its session is over")
            return model
        if model is None:
            row = await asyncio.to_thread(self._parts.store.models.get, tenant, model_id)
            if row is not None:
                raise Gone(
                    f"model {model_id!r} is closed, since its session is over; its checkpoints stay"
                )
        raise missing("model")

    async def row(self, tenant: str, model_id: str) -> ModelRow:
        """The row of a model, open or closed. Raises NotFound."""
        row = await asyncio.to_thread(self._parts.store.models.get, tenant, model_id)
        if row is None:
            raise missing("training run")
        return row

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
            NotFound, Gone: no such open model. DataError: its number was used for another request.
            Backpressure: too much waits already. TooLarge: it is more than can ever wait.
            SaveFailed: it could not be made durable.
        """
        model = await self.require(tenant, model_id)
        reply = Submitted(request_id=f"{model_id}:{seq}", model_id=model_id)
        if seq < FIRST_SEQ:
            raise DataError(f"seq_id is {seq}; the first one of a model is {FIRST_SEQ}")
        if model.order.is_repeated(seq, digest):
            return reply
        if model.order.num_early >= MOST_EARLY:
            raise Backpressure(
                f"{MOST_EARLY} operations of {model_id!r} wait for number {model.order.next_seq}"
            )
        request = self._counted_in(tenant, request, len(body))
        try:
            if isinstance(request.content, Outline):
                request = await self._prepared(model, request)
            record = Record(
                stream=model_id, seq=seq, kind=request.kind, tenant=tenant,
                request_id=reply.request_id, digest=digest, body=body, meta={},
            )  # fmt: skip
            new = await self._parts.accept(record)
        except BaseException:
            self._count_out(tenant, request)
            raise
        if new:
            model.order.remember(seq, digest)
            self.arrive(model, seq, request)
        else:
            self._count_out(tenant, request)
        return reply

    async def refuse(self, tenant: str, model_id: str, seq: int, error: ManyloraError) -> None:
        """Use up the number of a request that was refused, if the tenant has such a model: later
        ones would wait for it."""
        model = self._open.get(model_id)
        if model is None or model.tenant != tenant or model.closing or seq < FIRST_SEQ:
            return
        request = OperationRequest("refused", error)
        with suppress(DataError):  # the number was used before
            await self.submit(tenant, model_id, seq, request, str(error).encode(), "refused")

    def arrive(
        self, model: OpenAdapter, seq: int, request: OperationRequest, *, replayed: bool = False
    ) -> None:
        """Put a durable operation in its place, and run what is due."""
        model.arrived_at = self._parts.clock()
        snapshot = snapshot_made_by(model.row, request)
        if snapshot is not None:
            self._parts.coming.expect(snapshot)
        for due, waiting in model.order.offer(seq, request):
            self._next(model, Turn(due, waiting, replayed))
        if model.fault is not None:
            self.give_up(model)

    def give_up(self, model: OpenAdapter) -> None:
        """Fail the operations that wait for one that never came."""
        absent = model.order.next_seq
        for seq, request in model.order.give_up():
            self._next(model, Turn(seq, request, refusal=never_came(model.id, absent)))

    async def close_gap(self, model: OpenAdapter) -> None:
        """`give_up`, in a way that a restart repeats. Raises SaveFailed."""
        absent, last = model.order.next_seq, max(seq for seq, _ in model.order.early())
        record = Record(
            stream=model.id, seq=absent, kind=GIVEN_UP, tenant=model.tenant,
            request_id=f"{model.id}:{absent}", digest="", body=b"", meta={"until": last + 1},
        )  # fmt: skip
        await asyncio.wrap_future(self._parts.journal.append(record))
        if model.order.next_seq == absent:
            self.give_up(model)

    def save(self, model: OpenAdapter) -> None:
        """Have the model's state written as of the operations that were handed over."""
        model.unsaved_steps, model.touched, model.saved_at = 0, False, self._parts.clock()
        host, id = self._parts.host, model.id
        with suppress(Cancelled):  # the engine is gone, or the server stops: the journal has it
            host.call(id, lambda pager: pager.save(id), tenant=model.tenant)

    async def keep_last(self, model: OpenAdapter) -> None:
        """Write a model's state as its checkpoint `last`. Raises SaveFailed, QuotaExceeded."""
        await self._fed(model)
        await asyncio.wrap_future(self._operations.keep_last(model.row))

    async def close(self, model: OpenAdapter) -> None:
        """Take no more operations; what was handed over still runs, then the adapter is freed."""
        model.closing = True
        self.give_up(model)
        await self._fed(model)
        host, id = self._parts.host, model.id
        freed = host.unload(id, tenant=model.tenant)
        with suppress(Cancelled):
            await asyncio.wrap_future(freed)
        if self._parts.promises.closing:
            return  # what was queued has not run: the next start does all this again
        await asyncio.to_thread(self._parts.store.models.close, model.tenant, model.id)
        await asyncio.to_thread(self._parts.journal.forget, model.id)
        self._open.pop(model.id, None)

    # -- inside ---------------------------------------------------

    def _counted_in(
        self, tenant: str, request: OperationRequest, body_bytes: int
    ) -> OperationRequest:
        """A request that has been counted as held. Raises TooLarge, Backpressure."""
        self._parts.enter(tenant, request.tokens)
        try:
            self._parts.waiting.enter(tenant, body_bytes)
        except BaseException:
            self._parts.leave(tenant, request.tokens)
            raise
        return replace(request, body_bytes=body_bytes)

    def _count_out(self, tenant: str, request: OperationRequest) -> None:
        self._parts.leave(tenant, request.tokens)
        self._parts.waiting.leave(tenant, request.body_bytes)
        self._parts.decoded.leave(tenant, request.decoded_bytes)

    async def _prepared(self, model: OpenAdapter, request: OperationRequest) -> OperationRequest:
        """A forward_backward whose turn it is, decoded, if there is room; otherwise as it came.
        What is wrong with it uses its number up."""
        outline: Outline = request.content
        try:
            decoded, size = self._parts.decoded, outline.decoded_bytes
            decoded.check(size)
            its_turn = outline.seq_id == model.order.next_seq and not model.due
            if not its_turn or not decoded.fits(model.tenant, size):
                return request
            decoded.take(model.tenant, size)
            try:
                return await self._decoded(request)
            except BaseException:
                decoded.leave(model.tenant, size)
                raise
        except ManyloraError as error:
            await self.refuse(model.tenant, model.id, outline.seq_id, error)
            raise

    async def _decoded(self, request: OperationRequest) -> OperationRequest:
        """A request with its tensors; their bytes have been counted in."""
        outline: Outline = request.content
        if max(outline.decoded_bytes, len(outline.body)) <= INLINE:
            content = outline.decode()
        else:
            async with self._decoding:
                content = await asyncio.to_thread(outline.decode)
        return replace(request, content=content, decoded_bytes=outline.decoded_bytes)

    def _next(self, model: OpenAdapter, turn: Turn) -> None:
        """Hand the operation to the queue whose turn it is, behind those that are due before."""
        model.running += 1
        if not model.due and not self._is_packed(model, turn):
            self._run(model, turn)
            return
        model.due.append(turn)
        if model.feeding is None:
            model.feeding = self._parts.in_background(self._feed(model))

    async def _feed(self, model: OpenAdapter) -> None:
        """Decode and hand over what is due, as fast as there is room."""
        try:
            while model.due and not self._parts.promises.closing:
                if self._is_packed(model, model.due[0]):
                    await self._unpack(model, model.due[0])
                else:
                    self._run(model, model.due.popleft())
        except Cancelled:
            pass  # the server stops; it is in the journal
        finally:
            model.running -= len(model.due)
            model.feeding = None

    async def _unpack(self, model: OpenAdapter, turn: Turn) -> None:
        size = turn.request.content.decoded_bytes
        await self._parts.decoded.enter_in_turn(model.tenant, size)
        try:
            turn.request = await self._decoded(turn.request)
        except BaseException as error:
            self._parts.decoded.leave(model.tenant, size)
            if not isinstance(error, ManyloraError):
                raise
            turn.refusal = error

    async def _fed(self, model: OpenAdapter) -> None:
        """Wait until everything that is due has been handed over, or the server stops."""
        if model.feeding is not None:
            await asyncio.wait([model.feeding])

    def _is_packed(self, model: OpenAdapter, turn: Turn) -> bool:
        """Whether an operation has to be decoded before it can run."""
        if not isinstance(turn.request.content, Outline) or turn.refusal is not None:
            return False
        if model.fault is not None:
            return False
        known = turn.replayed and leaves_no_trace(turn.request)
        return not (known and self._operations.is_known(f"{model.id}:{turn.seq}"))

    def _run(self, model: OpenAdapter, turn: Turn) -> None:
        """Hand an operation to the queue; with a `refusal`, one that fails so."""
        seq, request, refusal = turn.seq, turn.request, turn.refusal
        request_id = f"{model.id}:{seq}"
        then = partial(self._done, model, seq, request)
        if self._parts.breakages.is_numbered_given_up(model.id, seq) and model.fault is None:
            self.set_fault(model, f"operation {seq} was running each time the engine broke down")
        if model.fault is not None:
            refusal = ModelFault(model.fault)
        if refusal is not None:
            request = replace(request, kind="refused", content=refusal)
        future, encode = self._operations.run(model.row, seq, request, replayed=turn.replayed)
        self._parts.promises.follow(request_id, future, encode, then)

    def _done(
        self, model: OpenAdapter, seq: int, request: OperationRequest, error: BaseException | None
    ) -> None:
        model.running -= 1
        model.touched = True
        self._count_out(model.tenant, request)
        if error is None:
            self._parts.breakages.acquit_numbered(model.id, seq)
        snapshot = snapshot_made_by(model.row, request)
        if snapshot is not None:
            self._parts.coming.arrived(snapshot)
        if model.fault is not None:  # it would fail again, so nobody needs to remember it
            self._parts.covered.append((model.id, seq))
        elif isinstance(error, CheckpointDamaged) and request.kind in TRAINING:
            self.set_fault(model, f"its state on disk is damaged ({error})")
        if request.kind != "optim_step":
            return
        if error is None:
            model.steps += 1
            model.unsaved_steps += 1
            if model.unsaved_steps >= self._parts.settings.saving.every_steps:
                self.save(model)
        elif not isinstance(error, ManyloraError) and model.fault is None:
            self.set_fault(model, f"an optimizer step broke off: {error}")

    def set_fault(self, model: OpenAdapter, fault: str) -> None:
        """From now on every operation of the model fails with these words."""
        log.error("model %s can no longer be used: %s", model.id, fault)
        model.fault = f"model {model.id!r} can no longer be used: {fault}; load a checkpoint of it"
        self._parts.in_background(
            asyncio.to_thread(self._parts.store.models.set_fault, model.id, model.fault)
        )


def never_came(model_id: str, seq: int) -> DataError:
    """The error of operations that waited for that one."""
    return DataError(f"operation {seq} of model {model_id!r} never arrived, so this one cannot run")


def seed_of(model_id: str) -> int:
    """A seed for a model whose client gave none; the same after a restart."""
    return int.from_bytes(hashlib.sha256(model_id.encode()).digest()[:4], "big")
