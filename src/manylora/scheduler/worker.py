"""The thread that takes batches from the queue and hands them to the engine."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from manylora.scheduler.queue import Call, OperationQueue, Pending
from manylora.types import (
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    OptimStep,
    OptimStepResult,
    Sample,
    SampledSequence,
)

log = logging.getLogger("manylora.scheduler")


class Runner(Protocol):
    """What the worker needs of an engine: for each operation a result, or its adapter's error."""

    def forward_backward(
        self, works: Sequence[ForwardBackward]
    ) -> Sequence[ForwardBackwardResult | ManyloraError]: ...

    def optim_step(
        self, steps: Sequence[OptimStep]
    ) -> Sequence[OptimStepResult | ManyloraError]: ...

    def sample(
        self, requests: Sequence[Sample]
    ) -> Sequence[list[SampledSequence] | ManyloraError]: ...


class Worker:
    """Runs batches one after another on a thread of its own, until the queue is closed."""

    def __init__(
        self, queue: OperationQueue, runner: Runner, on_start: Callable[[], None] = lambda: None
    ):
        """`on_start` runs on the new thread before the first batch."""
        self.queue = queue
        self.runner = runner
        self._on_start = on_start
        self._thread = threading.Thread(target=self._loop, name="manylora-engine", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the queue is closed and drained."""
        self._thread.join()

    def _loop(self) -> None:
        self._on_start()
        while batch := self._next():
            self._run(batch)

    def _next(self) -> list[Pending]:
        while True:
            batch = self.queue.next_batch()
            if batch or self.queue.drained:
                return batch

    def _run(self, batch: list[Pending]) -> None:
        operations: list[Any] = [pending.operation for pending in batch]
        try:
            first = operations[0]
            if isinstance(first, Call):
                outcomes: Sequence[Any] = [first.run()]
            elif isinstance(first, OptimStep):
                outcomes = self.runner.optim_step(operations)
            elif isinstance(first, Sample):
                outcomes = self.runner.sample(operations)
            else:
                outcomes = self.runner.forward_backward(operations)
        except Exception as error:  # a fault of ours or of the machine must not end the thread
            if not isinstance(error, ManyloraError):
                log.exception("a batch of %d operations failed", len(batch))
            outcomes = [error] * len(batch)
        for pending, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                pending.future.set_exception(outcome)
            else:
                pending.future.set_result(outcome)
