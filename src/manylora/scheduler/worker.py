"""A thread takes work from the queue and hands it to the engine."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from manylora.scheduler.queue import Call, Operation, OperationQueue, Pending
from manylora.scheduler.share import DeviceShare
from manylora.types import (
    Cancelled,
    DeviceTime,
    EngineLost,
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    OptimStep,
    OptimStepResult,
    Sample,
    SampleResult,
)

log = logging.getLogger("manylora.scheduler")

# How long the decode loop turns before training is asked whether it wants the device.
SLICE_SECONDS = 0.05
_KINDS: dict[type, str] = {
    ForwardBackward: "forward_backward",
    OptimStep: "optim_step",
    Call: "call",
}


class Runner(Protocol):
    """A runner has an engine's verbs for the worker: they give a result, or an adapter's error.

    `hosting.engine_protocol.EngineProtocol` adds the others; `hosting.Pager` is a runner, too.
    """

    def forward_backward(
        self, works: Sequence[ForwardBackward]
    ) -> Sequence[ForwardBackwardResult | ManyloraError]: ...

    def optim_step(
        self, steps: Sequence[OptimStep]
    ) -> Sequence[OptimStepResult | ManyloraError]: ...

    @property
    def decoding(self) -> int: ...

    def admit(self, samples: Sequence[Sample]) -> Sequence[ManyloraError | None]: ...

    def decode(self, seconds: float) -> list[tuple[Sample, SampleResult | ManyloraError]]: ...

    def cancel(self, sample: Sample) -> None: ...

    def interrupt(self, sample: Sample) -> None: ...


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A `BatchReport` says what the device did in one go.

    Attributes:
        kind: forward_backward, optim_step, call, or decode (a slice of the decode loop).
        seconds: how long.
        tokens: of each tenant; of a decode slice, those of the requests that it finished.
        waited: tenant and seconds in the queue of each operation that began with it.
        fill: share of the token budget, or of the decode loop's places, that was used.
    """

    kind: str
    seconds: float
    tokens: Mapping[str, int]
    waited: Sequence[tuple[str, float]]
    fill: float


class Worker:
    """A worker runs one thing after another on a thread of its own, until the queue is closed.

    Attributes:
        loss: how the engine was lost; None while it is there.
        lost_with: what was running then.
    """

    def __init__(
        self,
        queue: OperationQueue,
        runner: Runner,
        on_start: Callable[[], None] = lambda: None,
        *,
        observe: Callable[[BatchReport], None] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Start the thread.

        Args:
            on_start: runs on the new thread before the first batch.
            observe: told of every batch, on that thread; what it raises is logged.
            clock: measures what training and sampling use.
        """
        self.queue = queue
        self.runner = runner
        self._on_start = on_start
        self._observe = observe
        self._clock = clock
        self._share = DeviceShare()
        # Samples in the decode loop. Equal ones have equal answers, so which is which is no matter.
        self._decoding: dict[int, list[Pending]] = {}
        self._began: list[tuple[Pending, float]] = []
        self._dropping = False
        self.loss: EngineLost | None = None
        self.lost_with: list[Operation] = []
        self._thread = threading.Thread(target=self._loop, name="manylora-engine", daemon=True)
        self._thread.start()

    def drop_samples(self) -> None:
        """Have no sample in the decode loop finished. Any thread may, once the queue is closed."""
        self._dropping = True

    def join(self) -> None:
        """Wait until the queue is closed and drained."""
        self._thread.join()

    def _loop(self) -> None:
        self._on_start()
        while True:
            self._drop_cancelled()
            self._interrupt()
            self._admit()
            training, sampling = self.queue.can_train, bool(self._decoding)
            if not training and not sampling:
                if not self.queue.wait():
                    return
            elif self._share.trains_next(training=training, sampling=sampling):
                self._train()
            else:
                self._decode()

    # -- training and calls ---------------------------------------------------------------------

    def _train(self) -> None:
        batch = self.queue.next_batch()
        if not batch:
            return
        taken, began = time.monotonic(), self._clock()
        operations: list[Any] = [pending.operation for pending in batch]
        try:
            outcomes = self._run(operations)
        except Exception as error:  # a fault of ours or of the machine must not end the thread
            if not isinstance(error, ManyloraError):
                log.exception("a batch of %d operations failed", len(batch))
            outcomes = [error] * len(batch)
        for outcome in outcomes:
            self._note_loss(outcome, operations)
        seconds = self._clock() - began
        self._share.charge(training=True, seconds=seconds)
        whole = sum(pending.tokens for pending in batch)
        for pending, outcome in zip(batch, outcomes, strict=True):
            share = pending.tokens / whole if whole else 1 / len(batch)
            _settle(pending, _costing(outcome, DeviceTime(seconds, seconds * share)))
        tokens = [(pending.operation.tenant, pending.tokens) for pending in batch]
        fill = whole / self.queue.token_budget
        kind = _KINDS[type(operations[0])]
        self._report(kind, seconds, tokens, [(pending, taken) for pending in batch], fill)

    def _run(self, operations: Sequence[Any]) -> Sequence[Any]:
        if self.loss is not None:
            # Whatever runs now would stand on something that did not.
            raise self.loss
        first = operations[0]
        if isinstance(first, Call):
            return [first.run()]
        if isinstance(first, OptimStep):
            return self.runner.optim_step(operations)
        return self.runner.forward_backward(operations)

    # -- sampling -------------------------------------------------------------------------------

    def _admit(self) -> None:
        batch = self.queue.admit()
        if not batch:
            return
        operations: list[Any] = [pending.operation for pending in batch]
        try:
            if self.loss is not None:
                raise self.loss
            errors: Sequence[Exception | None] = self.runner.admit(operations)
        except Exception as error:
            if not isinstance(error, EngineLost):
                log.exception("%d samples were not admitted", len(batch))
            self._cancel_all(operations)
            errors = [error] * len(batch)
        for error in errors:
            self._note_loss(error, operations)
        for pending, error in zip(batch, errors, strict=True):
            if error is None:
                self._decoding.setdefault(id(pending.operation), []).append(pending)
                self._began.append((pending, time.monotonic()))
            else:
                self._finish(pending, error)

    def _decode(self) -> None:
        together = self._in_loop()
        began = self._clock()
        try:
            found: list[tuple[Sample, Any]] = list(self.runner.decode(SLICE_SECONDS))
            if not found and not self.runner.decoding:
                raise RuntimeError("the decode loop has lost its requests")
        except Exception as error:
            if not isinstance(error, EngineLost):
                log.exception("the decode loop failed")
            operations = [cast(Sample, pending.operation) for pending in together]
            self._note_loss(error, operations)
            found = [(operation, error) for operation in operations]
            self._cancel_all(operations)
        seconds = self._clock() - began
        self._share.charge(training=False, seconds=seconds)
        for pending in together:
            spent = pending.decoding
            pending.decoding = DeviceTime(
                spent.batches + seconds, spent.share + seconds / len(together)
            )
        fill = self.queue.places_held / self.queue.places
        for operation, outcome in found:
            pending = self._decoding[id(operation)][0]
            self._forget(pending)
            self._finish(pending, _costing(outcome, pending.decoding))
        tokens = [(sample.tenant, _sampled_tokens(sample, outcome)) for sample, outcome in found]
        self._report("decode", seconds, tokens, self._began, fill)
        self._began = []

    def _drop_cancelled(self) -> None:
        """Drop samples whose clients have given up: they need no more tokens."""
        for pending in self._in_loop():
            if pending.future.cancelled() or self._dropping:
                self._forget(pending)
                self._cancel_all([pending.operation])
                self._finish(pending, Cancelled("the sample was dropped before it was finished"))

    def _in_loop(self) -> list[Pending]:
        return [pending for entries in self._decoding.values() for pending in entries]

    def _interrupt(self) -> None:
        """End the samples that clients have interrupted, as far as they are in the decode loop."""
        for interrupt in self.queue.interrupts():
            waiting = self._in_loop()
            try:
                for pending in waiting:
                    if interrupt.concerns(pending):
                        self.runner.interrupt(cast(Sample, pending.operation))
            except Exception as error:
                self._note_loss(error, [pending.operation for pending in waiting])
                interrupt.future.set_exception(error)
            else:
                interrupt.future.set_result(None)

    def _forget(self, pending: Pending) -> None:
        entries = self._decoding[id(pending.operation)]
        entries.remove(pending)
        if not entries:
            del self._decoding[id(pending.operation)]

    def _cancel_all(self, operations: Sequence[Any]) -> None:
        for operation in operations:
            try:
                self.runner.cancel(operation)
            except EngineLost:
                return
            except Exception:  # the engine is in trouble already
                log.exception("a sample could not be cancelled")

    def _note_loss(self, error: Any, operations: Sequence[Operation]) -> None:
        if isinstance(error, EngineLost) and self.loss is None:
            self.loss, self.lost_with = error, list(operations)

    def _finish(self, pending: Pending, outcome: Any) -> None:
        """Give a sample's places back, and its client the outcome, if it still waits."""
        self.queue.release(pending)
        if pending.future.set_running_or_notify_cancel():
            _settle(pending, outcome)

    def _report(
        self,
        kind: str,
        seconds: float,
        tokens: Sequence[tuple[str, int]],
        began: Sequence[tuple[Pending, float]],
        fill: float,
    ) -> None:
        sums: dict[str, int] = {}
        for tenant, count in tokens:
            sums[tenant] = sums.get(tenant, 0) + count
        waited = [(p.operation.tenant, now - p.submitted) for p, now in began]
        try:
            self._observe(BatchReport(kind, seconds, sums, waited, fill))
        except Exception:
            log.exception("the observer of batches failed")


def _settle(pending: Pending, outcome: Any) -> None:
    if isinstance(outcome, Exception):
        pending.future.set_exception(outcome)
    else:
        pending.future.set_result(outcome)


def _costing(outcome: Any, device: DeviceTime) -> Any:
    """Return the outcome, with what it cost if it is a result that says so."""
    if isinstance(outcome, ForwardBackwardResult | OptimStepResult | SampleResult):
        return replace(outcome, device=device)
    return outcome


def _sampled_tokens(sample: Sample, outcome: Any) -> int:
    """Count the tokens of the prompts that were read and of the answers."""
    if not isinstance(outcome, SampleResult):
        return 0
    prompts = sum(len(prompt) for prompt in sample.prompts)
    return prompts + sum(len(sequence.tokens) for sequence in outcome.sequences)
