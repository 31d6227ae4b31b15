"""Per-adapter FIFOs, and the choice of what runs next.

Operations of one adapter run strictly in order. What stands at the heads of different adapters'
lanes is merged: their forward-backward work into one call, their optimizer steps into one call,
their samples into one decode loop. Between adapters, tokens are dealt by deficit round robin
(https://doi.org/10.1109/90.502236): each lane earns the same number of tokens a round, and spends
what it has saved, so one adapter with a thousand queued requests delays another's single request
by one batch at most.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from manylora.types import Cancelled, ForwardBackward, OptimStep, Sample

# The lane of operations that belong to no adapter.
BASE_LANE = ""


@dataclass(frozen=True, slots=True)
class Call:
    """Something that needs the engine for itself: create, save, load, export, unload."""

    adapter: str | None
    run: Callable[[], Any]


Operation = ForwardBackward | OptimStep | Sample | Call


@dataclass(slots=True)
class Pending:
    """A queued operation and the future that waits for it."""

    operation: Operation
    future: Future[Any]
    tokens: int


@dataclass(slots=True)
class _Lane:
    waiting: deque[Pending] = field(default_factory=deque)
    deficit: float = 0.0


class OperationQueue:
    """The one queue behind every door. Thread-safe."""

    def __init__(self, token_budget: int):
        """`token_budget`: tokens of one batch (a larger operation runs alone)."""
        self.token_budget = token_budget
        self._lanes: OrderedDict[str, _Lane] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._sampled_last = False

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation behind the others of its adapter.

        Raises:
            Cancelled: the queue is closed.
        """
        tokens = operation.num_tokens if isinstance(operation, ForwardBackward | Sample) else 0
        pending = Pending(operation, Future(), tokens)
        with self._changed:
            if self._closed:
                raise Cancelled("the trainer is closed; open a new one")
            lane = self._lanes.setdefault(operation.adapter or BASE_LANE, _Lane())
            lane.waiting.append(pending)
            self._changed.notify()
        return pending.future

    def close(self) -> None:
        """Accept nothing more; what is queued still runs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def cancel_waiting(self) -> None:
        """Drop everything that has not started."""
        with self._changed:
            dropped = [pending for lane in self._lanes.values() for pending in lane.waiting]
            self._lanes.clear()
        for pending in dropped:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(Cancelled("the operation was dropped before it ran"))

    def next_batch(self) -> list[Pending]:
        """Wait for work and take what runs next: operations of one kind, from as many adapters as
        have such work at their heads. Empty once the queue is closed and drained."""
        with self._changed:
            while not self._lanes:
                if self._closed:
                    return []
                self._changed.wait()
            batch = self._choose()
            for name in [name for name, lane in self._lanes.items() if not lane.waiting]:
                del self._lanes[name]
        return [pending for pending in batch if pending.future.set_running_or_notify_cancel()]

    @property
    def drained(self) -> bool:
        """Closed, with nothing left to run."""
        with self._changed:
            return self._closed and not self._lanes

    def _choose(self) -> list[Pending]:
        calls = self._lanes_with(Call)
        if calls:
            return [calls[0].waiting.popleft()]
        steps = self._lanes_with(OptimStep)
        if steps:
            return [lane.waiting.popleft() for lane in steps]
        samples, works = self._lanes_with(Sample), self._lanes_with(ForwardBackward)
        # Training and sampling take turns when both wait.
        self._sampled_last = bool(samples) and not (works and self._sampled_last)
        if self._sampled_last:
            return self._deal(samples, Sample)
        return self._deal(works, ForwardBackward)

    def _lanes_with(self, kind: type) -> list[_Lane]:
        return [
            lane
            for lane in self._lanes.values()
            if lane.waiting and isinstance(lane.waiting[0].operation, kind)
        ]

    def _deal(self, lanes: list[_Lane], kind: type) -> list[Pending]:
        """One round of deficit round robin, and more until something was taken."""
        batch: list[Pending] = []
        room = self.token_budget
        quantum = self.token_budget / len(lanes)
        while not batch:
            for lane in lanes:
                lane.deficit = min(lane.deficit + quantum, self._most_useful(lane))
                while lane.waiting and isinstance(lane.waiting[0].operation, kind):
                    head = lane.waiting[0]
                    if head.tokens > lane.deficit or (batch and head.tokens > room):
                        break
                    lane.deficit -= head.tokens
                    room -= head.tokens
                    batch.append(lane.waiting.popleft())
        # Who was served goes to the back of the line.
        for name, lane in list(self._lanes.items()):
            if lane in lanes and not (lane.waiting and lane.deficit >= lane.waiting[0].tokens):
                self._lanes.move_to_end(name)
        return batch

    def _most_useful(self, lane: _Lane) -> float:
        """A lane cannot save up more than its next operation and one budget."""
        return max(self.token_budget, lane.waiting[0].tokens if lane.waiting else 0)
