"""The queue has a lane for each adapter, and chooses what runs next.

Operations of one adapter run strictly in order. What stands at the heads of different adapters'
lanes is merged: their forward-backward work into one call, their optimizer steps into one call,
their samples into one decode loop. Between tenants, and then between a tenant's adapters, tokens
are dealt fairly (see `turns`): whatever one tenant has queued, another's single request is in the
next batch. Choosing costs what the batch costs, not what is queued.

Samples are admitted while there are places in the decode loop, which are dealt by dynamic
thresholds (https://doi.org/10.1109/90.664262). A sample of an adapter's living weights holds up its
lane until it is finished, because they must not change meanwhile; one of a snapshot does not.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

from manylora.scheduler.turns import Turns
from manylora.types import (
    Cancelled,
    DeviceTime,
    ForwardBackward,
    OptimStep,
    Sample,
    SampledSequence,
    SampleResult,
)

# A tenant may hold this many times the places that would still be free: alone, 7/8 of all.
ALPHA = 7
# Places of the decode loop, in continuations.
PLACES = 256
# Lanes that are passed over because their next operation does not fit a batch any more.
MISFITS = 16


@dataclass(frozen=True, slots=True)
class Call:
    """A `Call` needs the engine for itself: create, save, load, export, unload."""

    adapter: str | None
    run: Callable[[], Any]
    tenant: str = ""
    seq: int = 0


Operation = ForwardBackward | OptimStep | Sample | Call
LaneKey = tuple[str, str]
TRAINING = (Call, OptimStep, ForwardBackward)
# What belongs to no adapter stands in lanes of these names.
_NO_ADAPTER: dict[type, str] = {Sample: "sample", ForwardBackward: "forward"}


@dataclass(slots=True, eq=False)
class Pending:
    """A `Pending` is a queued operation and the future that waits for it.

    Attributes:
        tokens: what a batch counts it for; 0 where it brings none.
        submitted: when, by the monotonic clock.
        number: how many were submitted before.
        lane: its adapter's.
        decoding: of a sample in the decode loop, the device's time that it has had.
    """

    operation: Operation
    future: Future[Any]
    tokens: int
    submitted: float
    lane: "Lane"
    number: int = 0
    decoding: DeviceTime = field(default_factory=DeviceTime)

    @property
    def places(self) -> int:
        """It takes so many places of the decode loop."""
        operation = self.operation
        if not isinstance(operation, Sample):
            return 0
        return max(1, operation.num_samples * len(operation.prompts))

    @property
    def reads_living_weights(self) -> bool:
        operation = self.operation
        if not isinstance(operation, Sample):
            return False
        return operation.adapter is not None and operation.snapshot is None


@dataclass(frozen=True, slots=True)
class Interrupt:
    """An `Interrupt` ends an adapter's samples that were submitted before it.

    Attributes:
        before: the number of the first operation that was submitted afterwards.
        future: done once none of them decodes any more.
    """

    adapter: str
    before: int
    future: Future[None]

    def concerns(self, pending: Pending) -> bool:
        """Say whether it ends this operation."""
        operation = pending.operation
        own = isinstance(operation, Sample) and operation.adapter == self.adapter
        return own and pending.number < self.before


@dataclass(slots=True, eq=False)
class Lane:
    """A lane holds one adapter's operations in order.

    Attributes:
        waiting: those that have not started.
        kind: the kind of turn that the first of them waits for, if any.
        decoding: how many samples of the living weights are in the decode loop.
    """

    key: LaneKey
    tenant: "Tenant"
    waiting: deque[Pending] = field(default_factory=deque)
    kind: type | None = None
    decoding: int = 0

    def next_kind(self) -> type | None:
        """Return the kind of the operation that may run next."""
        if not self.waiting:
            return None
        operation = self.waiting[0].operation
        return None if self.decoding and not isinstance(operation, Sample) else type(operation)


@dataclass(slots=True, eq=False)
class Tenant:
    """A tenant has lanes by the kind of turn that they wait for, and what it queued and holds."""

    name: str
    lanes: dict[type, Turns[LaneKey]] = field(
        default_factory=lambda: {kind: Turns() for kind in (*TRAINING, Sample)}
    )
    operations: int = 0
    tokens: int = 0
    places: int = 0


class OperationQueue:
    """The queue stands before an engine. It is thread-safe."""

    def __init__(
        self,
        token_budget: int,
        *,
        max_adapters: int | None = None,
        places: int = PLACES,
        apart: Callable[[Operation], bool] = lambda operation: False,
    ):
        """Make an empty queue.

        Args:
            token_budget: tokens of one batch (a larger operation runs alone).
            max_adapters: most adapters of one batch; None = any number.
            places: continuations that may be in the decode loop; a larger request may be, if its
                tenant has no other there.
            apart: whether an operation is to run in a batch, or in the decode loop, of its own.
        """
        self.token_budget = token_budget
        self.max_adapters = max_adapters
        self.places = places
        self.apart = apart
        self._lanes: dict[LaneKey, Lane] = {}
        self._tenants: dict[str, Tenant] = {}
        self._turns: dict[type, Turns[str]] = {kind: Turns() for kind in (*TRAINING, Sample)}
        self._kinds = list[type](TRAINING)
        self._free_places = places
        self._alone: Pending | None = None  # in the decode loop, apart from all others
        self._places_changed = True
        self._operations = 0
        self._submitted = 0
        self._interrupts: list[Interrupt] = []
        self._changed = threading.Condition()
        self._closed = False

    # -- clients --------------------------------------------------------------------------------

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation behind its adapter's others. Raises Cancelled: the queue is closed."""
        tokens = operation.num_tokens if isinstance(operation, ForwardBackward | Sample) else 0
        with self._changed:
            if self._closed:
                raise Cancelled("the trainer is closed; open a new one")
            lane = self._lane(operation)
            pending = Pending(operation, Future(), tokens, time.monotonic(), lane, self._submitted)
            self._submitted += 1
            lane.waiting.append(pending)
            self._count(pending, 1)
            if len(lane.waiting) == 1:
                self._place(lane)
            self._changed.notify()
        return pending.future

    def waiting(self, tenant: str) -> tuple[int, int]:
        """Return how many operations of a tenant wait, and their tokens."""
        with self._changed:
            known = self._tenants.get(tenant)
            return (0, 0) if known is None else (known.operations, known.tokens)

    def interrupt(self, adapter: str) -> Future[None]:
        """End the samples of an adapter and its snapshots that are here, or in the decode loop.

        Those that have not started are answered with empty sequences, and their operations behind
        them go on; the others are the worker's to end (see `interrupts`).

        Returns:
            A future that is done once none of them decodes any more.

        Raises:
            Cancelled: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise Cancelled("the trainer is closed; nothing can be interrupted")
            interrupt = Interrupt(adapter, self._submitted, Future())
            self._interrupts.append(interrupt)
            lane = self._lanes.get(("adapter", adapter))
            ended = [] if lane is None else [one for one in lane.waiting if interrupt.concerns(one)]
            if lane is not None:
                lane.waiting = deque(one for one in lane.waiting if not interrupt.concerns(one))
                for pending in ended:
                    self._count(pending, -1)
                self._place(lane)
                self._forget(lane)
            self._changed.notify_all()
        for pending in ended:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_result(_unbegun(cast(Sample, pending.operation)))
        return interrupt.future

    def close(self) -> None:
        """Accept nothing more; what is queued still runs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def cancel_waiting(self) -> None:
        """Drop everything that has not started."""
        with self._changed:
            dropped = [pending for lane in self._lanes.values() for pending in lane.waiting]
            for lane in list(self._lanes.values()):
                for pending in lane.waiting:
                    self._count(pending, -1)
                lane.waiting.clear()
                self._place(lane)
                self._forget(lane)
            self._changed.notify_all()
        for pending in dropped:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(Cancelled("the operation was dropped before it ran"))

    # -- the worker -----------------------------------------------------------------------------

    def wait(self) -> bool:
        """Wait until something is queued; return False once the queue is closed and drained."""
        with self._changed:
            while not self._operations and not self._interrupts and not self._closed:
                self._changed.wait()
            return self._operations > 0 or bool(self._interrupts)

    def interrupts(self) -> list[Interrupt]:
        """Return the interrupts that were asked for and not returned yet."""
        with self._changed:
            found = list(self._interrupts)
            self._interrupts.clear()
            return found

    @property
    def drained(self) -> bool:
        """It tells whether the queue is closed, with nothing left to run."""
        with self._changed:
            return self._closed and not self._operations

    @property
    def can_train(self) -> bool:
        """It tells whether `next_batch` has something."""
        with self._changed:
            return any(self._turns[kind] for kind in TRAINING)

    @property
    def places_held(self) -> int:
        """So many places of the decode loop are taken."""
        with self._changed:
            return self.places - self._free_places

    def next_batch(self) -> list[Pending]:
        """Return what runs next, other than samples: operations of one kind, from as many adapters
        as have such work at their heads. It never waits, and may be empty."""
        with self._changed:
            for kind in self._kinds:
                if self._turns[kind]:
                    # The kinds take turns, so that no flood of one keeps the others out.
                    self._kinds.remove(kind)
                    self._kinds.append(kind)
                    return self._fill(kind)
            return []

    def admit(self) -> list[Pending]:
        """Return the samples that may join the decode loop now. It never waits, and may be empty.

        They hold their places, and those of living weights their lanes, until `release`. Their
        futures are not running yet: their clients may still cancel them.
        """
        with self._changed:
            if not self._places_changed:
                return []
            batch = self._fill(Sample)
            # What was left out by the limits of this batch may be in the next.
            self._places_changed = bool(batch)
            return batch

    def release(self, pending: Pending) -> None:
        """Give the places back of a sample that was admitted and is finished."""
        with self._changed:
            lane = pending.lane
            held = self._capped(pending.places)
            self._free_places += held
            if self._alone is pending:
                self._alone = None
            lane.tenant.places -= held
            self._places_changed = True
            if pending.reads_living_weights:
                lane.decoding -= 1
                self._place(lane)
            self._forget(lane)

    # -- inside; the lock is held ---------------------------------------------------------------

    def _lane(self, operation: Operation) -> Lane:
        """Return the adapter's lane; what belongs to no adapter has one of its kind and tenant."""
        if operation.adapter is not None:
            key = ("adapter", operation.adapter)
        else:
            key = (_NO_ADAPTER.get(type(operation), "other"), operation.tenant)
        lane = self._lanes.get(key)
        if lane is None:
            tenant = self._tenants.setdefault(operation.tenant, Tenant(operation.tenant))
            lane = self._lanes[key] = Lane(key, tenant)
        return lane

    def _count(self, pending: Pending, sign: int) -> None:
        tenant = pending.lane.tenant
        self._operations += sign
        tenant.operations += sign
        tenant.tokens += sign * pending.tokens

    def _place(self, lane: Lane) -> None:
        """Let a lane wait for the kind of turn that its head needs, and its tenant with it."""
        kind, tenant = lane.next_kind(), lane.tenant
        if kind is Sample:
            self._places_changed = True
        if kind is lane.kind:
            return
        if lane.kind is not None:
            tenant.lanes[lane.kind].leave(lane.key)
            if not tenant.lanes[lane.kind]:
                self._turns[lane.kind].leave(tenant.name)
        if kind is not None:
            tenant.lanes[kind].join(lane.key)
            self._turns[kind].join(tenant.name)
        lane.kind = kind

    def _forget(self, lane: Lane) -> None:
        """Keep neither lanes nor tenants that have nothing here."""
        # An idle lane may have been followed by another before its sample was finished.
        if not lane.waiting and not lane.decoding and self._lanes.get(lane.key) is lane:
            del self._lanes[lane.key]
        tenant = lane.tenant
        if not tenant.operations and not tenant.places:
            self._tenants.pop(tenant.name, None)

    def _fill(self, kind: type) -> list[Pending]:
        """Fill a batch of one kind: the tenant that has had least goes first, while something fits.

        A lane that cannot go on is put aside, and with its last lane its tenant, so that the next
        in turn is seen; both go back at the end with the tags that they had, so being passed over
        costs no turn. `MISFITS` bounds how many are passed over, so the cost is the batch's.
        """
        batch: list[Pending] = []
        aside: list[tuple[str, LaneKey]] = []
        adapters: dict[LaneKey, Lane] = {}
        room, misfits, turns, alone = self.token_budget, 0, self._turns[kind], False
        while (name := turns.first()) is not None and misfits < MISFITS:
            if kind is Sample and (self._alone is not None or not self._free_places):
                break
            lanes = self._tenants[name].lanes[kind]
            key = lanes.first()
            assert key is not None
            lane = self._lanes[key]
            alone = self.apart(lane.waiting[0].operation)
            if kind is Sample and alone and self.places != self._free_places:
                break  # those that are in the loop end first, and no other joins them
            if self._fits(lane, kind, room, adapters) and not (alone and batch):
                room -= self._take(lane, kind, batch)
                adapters[key] = lane
                if (kind is Call or alone) and batch:
                    break
                # A second step of an adapter needs the outcome of the first.
                if kind is not OptimStep or lane.kind is not OptimStep:
                    continue
            else:
                misfits += kind is ForwardBackward
            lanes.put_aside(key)
            aside.append((name, key))
            if not lanes or kind is Sample:
                turns.put_aside(name)
        for name, key in aside:
            self._tenants[name].lanes[kind].put_back(key)
            if name not in turns:
                turns.put_back(name)
        if kind is ForwardBackward and len(adapters) == self.max_adapters and not alone:
            self._top_up(list(adapters.values()), room, batch)
        return batch

    def _fits(self, lane: Lane, kind: type, room: int, adapters: dict[LaneKey, Lane]) -> bool:
        """Return whether a lane's next operation may join a batch."""
        head = lane.waiting[0]
        cancelled = head.future.cancelled()
        another = not cancelled and bool(adapters) and lane.key not in adapters
        full = another and len(adapters) == self.max_adapters
        if kind is Sample and not cancelled:
            held, wanted = lane.tenant.places, self._capped(head.places)
            left = self._free_places - wanted
            return not full and left >= 0 and (not held or held + wanted <= ALPHA * left)
        return not full and (kind is not ForwardBackward or not adapters or head.tokens <= room)

    def _top_up(self, lanes: list[Lane], room: int, batch: list[Pending]) -> None:
        """Fill what is left with more of the adapters that a full batch has anyway."""
        while lanes:
            taken: list[Lane] = []
            for lane in lanes:
                if lane.kind is ForwardBackward and lane.waiting[0].tokens <= room:
                    room -= self._take(lane, ForwardBackward, batch)
                    taken.append(lane)
            lanes = taken  # where nothing fits now, nothing will: the room only shrinks

    def _take(self, lane: Lane, kind: type, batch: list[Pending]) -> int:
        """Take a lane's head, unless its client cancelled it; return how many tokens were taken."""
        pending, tenant = lane.waiting.popleft(), lane.tenant
        self._count(pending, -1)
        future = pending.future
        # A sample's future does not run yet: it can be cancelled until the sample is finished.
        wanted = not future.cancelled() if kind is Sample else True
        if (kind is not Sample or not wanted) and not future.set_running_or_notify_cancel():
            wanted = False
        if wanted:
            batch.append(pending)
            cost = max(1, pending.tokens)
            tenant.lanes[kind].charge(lane.key, cost)
            self._turns[kind].charge(tenant.name, cost)
            if kind is Sample:
                held = self._capped(pending.places)
                self._free_places -= held
                self._alone = pending if self.apart(pending.operation) else None
                tenant.places += held
                lane.decoding += pending.reads_living_weights
        self._place(lane)
        self._forget(lane)
        return pending.tokens if wanted else 0

    def _capped(self, places: int) -> int:
        """Return the places that a request counts for: all that a tenant may hold, if it is larger
        than that, so that there is room beside it."""
        return min(places, max(1, self.places * ALPHA // (ALPHA + 1)))


def _unbegun(sample: Sample) -> SampleResult:
    """Return the result of a sample that was interrupted before it started."""
    count = max(0, sample.num_samples) * len(sample.prompts)
    return SampleResult((SampledSequence((), (), "interrupted"),) * count)
