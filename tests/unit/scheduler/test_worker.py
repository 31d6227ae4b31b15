"""The engine's thread: results reach their futures, and a raising batch ends nothing."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from manylora.scheduler import BatchReport, Call, OperationQueue, Worker
from manylora.types import (
    AdamParams,
    Cancelled,
    DataError,
    DeviceTime,
    EngineLost,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    Sample,
    SampleResult,
    SamplingParams,
    causal_datum,
)

WAIT = 20  # seconds that a healthy thread never needs


class Recorder:
    """An engine that notes what it is given; adapters named `bad…` fail in some way."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.loop: list[Sample] = []
        self.ages: dict[int, int] = {}
        self.cancelled: list[Sample] = []
        self.turns = 0

    def hold(self, queue: OperationQueue) -> None:
        """Keep the thread busy, so that what is queued next meets in one batch."""
        self.gate.clear()
        queue.submit(step("first"))
        assert self.entered.wait(WAIT)

    def _run(self, operations: Sequence[Any]) -> list[Any]:
        self.entered.set()
        assert self.gate.wait(WAIT)
        self.threads.add(threading.current_thread().name)
        self.seen.extend(operations)
        for operation in operations:
            if operation.adapter == "bad-machine":
                raise RuntimeError("out of memory")
            if operation.adapter == "deadly":
                raise EngineLost("it is gone")
        return [DataError("bad data") if op.adapter == "bad-data" else op for op in operations]

    def forward_backward(self, works: Sequence[ForwardBackward]) -> list[Any]:
        return self._run(works)

    def optim_step(self, steps: Sequence[OptimStep]) -> list[Any]:
        return self._run(steps)

    def admit(self, samples: Sequence[Sample]) -> list[Any]:
        self.threads.add(threading.current_thread().name)
        errors = [DataError("bad") if s.adapter == "bad-data" else None for s in samples]
        self.loop += [s for s, error in zip(samples, errors, strict=True) if error is None]
        return errors

    @property
    def decoding(self) -> int:
        return len(self.loop)

    def decode(self, seconds: float) -> list[Any]:
        """A request is finished after as many turns as it has tokens to make."""
        assert self.gate.wait(WAIT)
        self.entered.set()
        self.turns += 1
        time.sleep(0.001)
        done = []
        for sample in list(self.loop):
            if sample.adapter == "bad-machine":
                raise RuntimeError("out of memory")
            self.ages[id(sample)] = self.ages.get(id(sample), 0) + 1
            if self.ages[id(sample)] >= sample.params.max_tokens:
                self.loop.remove(sample)
                self.seen.append(sample)
                done.append((sample, SampleResult(())))
        return done

    def cancel(self, sample: Sample) -> None:
        self.cancelled.append(sample)
        self.loop = [other for other in self.loop if other is not sample]

    def interrupt(self, sample: Sample) -> None:
        raise AssertionError("nobody interrupts here")


@pytest.fixture
def rig():
    queue, recorder = OperationQueue(100), Recorder()
    worker = Worker(queue, recorder)
    yield queue, recorder
    recorder.gate.set()
    queue.close()
    worker.join()


def step(adapter: str) -> OptimStep:
    return OptimStep(adapter=adapter, params=AdamParams(lr=1.0))


def sample(adapter: str | None, turns: int = 1, **settings: Any) -> Sample:
    params = SamplingParams(max_tokens=turns)
    return Sample(adapter=adapter, prompts=[[1]], params=params, **settings)


def test_every_kind_goes_to_its_verb_on_one_thread(rig):
    queue, recorder = rig
    operations = [step("a"), ForwardBackward(adapter="a", data=[])]
    futures = [queue.submit(operation) for operation in operations]
    sampled = queue.submit(sample(None))
    called = queue.submit(Call(None, lambda: threading.current_thread().name))
    assert [future.result(WAIT) for future in futures] == operations
    assert sampled.result(WAIT) == SampleResult(())
    assert recorder.threads == {called.result(WAIT)} == {"manylora-engine"}


class Counting:
    """A clock that tells a second more each time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_result_tells_what_it_cost():
    class Timed(Recorder):
        def forward_backward(self, works: Sequence[ForwardBackward]) -> list[Any]:
            self._run(works)
            return [ForwardBackwardResult((), 0.0) for _ in works]

    queue, recorder = OperationQueue(1000), Timed()
    worker = Worker(queue, recorder, clock=Counting())
    recorder.hold(queue)
    datum = causal_datum([1, 2, 3, 4, 5], [1.0] * 5)
    works = [
        ForwardBackward(adapter=name, data=[datum] * count) for name, count in (("a", 1), ("b", 3))
    ]
    futures = [queue.submit(work) for work in works]
    # Two slices of the decode loop together, and one more for the second.
    futures += [queue.submit(sample(None, turns)) for turns in (2, 3)]
    recorder.gate.set()
    costs = [future.result(WAIT).device for future in futures]
    queue.close()
    worker.join()
    assert costs == [
        DeviceTime(1.0, 0.25), DeviceTime(1.0, 0.75), DeviceTime(2.0, 1.0), DeviceTime(3.0, 2.0)
    ]  # fmt: skip


def test_an_error_as_a_value_is_its_own_futures(rig):
    queue, recorder = rig
    recorder.hold(queue)
    good, bad = queue.submit(step("good")), queue.submit(step("bad-data"))
    recorder.gate.set()
    assert isinstance(bad.exception(WAIT), DataError)
    assert good.result(WAIT).adapter == "good"


def test_a_raising_engine_fails_its_batch_and_lives_on(rig, caplog: pytest.LogCaptureFixture):
    queue, recorder = rig
    recorder.hold(queue)
    together = [queue.submit(step("bad-machine")), queue.submit(step("beside"))]
    recorder.gate.set()
    with caplog.at_level(logging.ERROR, "manylora.scheduler"):
        assert [str(future.exception(WAIT)) for future in together] == ["out of memory"] * 2
    assert "a batch of 2 operations failed" in caplog.text
    assert queue.submit(step("after")).result(WAIT).adapter == "after"


def test_a_raising_call_fails_alone(rig):
    queue, _ = rig

    def fail() -> None:
        raise DataError("no")

    assert isinstance(queue.submit(Call("a", fail)).exception(WAIT), DataError)
    assert queue.submit(Call("a", lambda: 5)).result(WAIT) == 5


def test_order_within_an_adapter_under_many_threads(rig):
    """Each thread submits for its own two adapters and for one that all of them share."""
    queue, recorder = rig
    lock, shared = threading.Lock(), []

    def submit_all(number: int) -> None:
        for i in range(50):
            queue.submit(ForwardBackward(adapter=f"own-{number}", data=[], config={"i": i}))
            queue.submit(OptimStep(adapter=f"own-{number}", params=AdamParams(lr=i)))
            with lock:  # so that we know the order in which it was submitted
                operation = ForwardBackward(adapter="shared", data=[], config={"i": len(shared)})
                shared.append(operation)
                queue.submit(operation)

    threads = [threading.Thread(target=submit_all, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        queue.submit(Call(f"own-{number}", lambda: None)).result(WAIT)
    queue.submit(Call("shared", lambda: None)).result(WAIT)
    assert [op for op in recorder.seen if op.adapter == "shared"] == shared
    for number in range(4):
        own = [op for op in recorder.seen if op.adapter == f"own-{number}"]
        assert [type(op) for op in own] == [ForwardBackward, OptimStep] * 50
        assert (
            [op.config["i"] for op in own[::2]]
            == [op.params.lr for op in own[1::2]]
            == list(range(50))
        )


def test_the_thread_prepares_itself_first():
    queue, started = OperationQueue(1), []
    worker = Worker(
        queue, Recorder(), on_start=lambda: started.append(threading.current_thread().name)
    )
    assert queue.submit(Call(None, lambda: list(started))).result(WAIT) == ["manylora-engine"]
    queue.close()
    worker.join()


def test_a_sample_that_is_refused_gives_its_place_back(rig):
    queue, _ = rig
    assert isinstance(queue.submit(sample("bad-data")).exception(WAIT), DataError)
    assert queue.submit(step("bad-data")).exception(WAIT) is not None  # its lane goes on
    assert queue.places_held == 0


def test_a_failing_loop_fails_what_is_in_it_and_lives_on(rig, caplog: pytest.LogCaptureFixture):
    queue, recorder = rig
    recorder.gate.clear()
    futures = [queue.submit(sample("beside", 1000)), queue.submit(sample("bad-machine"))]
    recorder.gate.set()
    with caplog.at_level(logging.ERROR, "manylora.scheduler"):
        assert [str(future.exception(WAIT)) for future in futures] == ["out of memory"] * 2
    assert "the decode loop failed" in caplog.text
    assert queue.submit(sample("after")).result(WAIT) == SampleResult(())
    assert queue.places_held == 0 and len(recorder.cancelled) == 2


def test_training_goes_on_while_samples_decode_and_newcomers_join(rig):
    queue, recorder = rig
    long = queue.submit(sample("a", 10**9))
    assert queue.submit(step("b")).result(WAIT)
    assert queue.submit(sample("c", 3)).result(WAIT) == SampleResult(())
    held = queue.submit(step("a"))  # waits for the sample of its weights
    assert queue.submit(step("b")).result(WAIT)
    assert not held.done()
    assert long.cancel()
    assert held.result(WAIT)
    assert [s.adapter for s in recorder.cancelled] == ["a"]
    assert recorder.loop == []


def test_a_cancelled_sample_leaves_the_loop(rig):
    queue, recorder = rig
    future = queue.submit(sample(None, 10**9))
    assert recorder.entered.wait(WAIT)
    assert future.cancel()
    assert queue.submit(sample(None, 1)).result(WAIT)
    assert len(recorder.cancelled) == 1 and queue.places_held == 0


def test_one_operation_submitted_twice_is_answered_twice(rig):
    queue, _ = rig
    operation = sample(None, 2)
    futures = [queue.submit(operation), queue.submit(operation)]
    assert [future.result(WAIT) for future in futures] == [SampleResult(())] * 2


def test_closing_finishes_what_decodes():
    queue, recorder = OperationQueue(100), Recorder()
    worker = Worker(queue, recorder)
    futures = [queue.submit(sample("a", 5)), queue.submit(step("a"))]
    queue.close()
    worker.join()
    assert all(future.done() for future in futures)


def test_what_decodes_can_be_dropped_when_closing():
    queue, recorder = OperationQueue(100), Recorder()
    worker = Worker(queue, recorder)
    future = queue.submit(sample("a", 10**9))
    assert recorder.entered.wait(WAIT)
    queue.close()
    worker.drop_samples()
    worker.join()
    assert isinstance(future.exception(), Cancelled)
    assert len(recorder.cancelled) == 1 and queue.places_held == 0


def test_every_batch_is_reported_and_a_failing_observer_ends_nothing(
    caplog: pytest.LogCaptureFixture,
):
    reports: list[BatchReport] = []

    def observe(report: BatchReport) -> None:
        reports.append(report)
        raise ValueError("the observer is broken")

    queue = OperationQueue(100, places=8)
    with caplog.at_level(logging.ERROR, "manylora.scheduler"):
        worker = Worker(queue, Recorder(), observe=observe)
        queue.submit(OptimStep(adapter="a", params=AdamParams(lr=1.0), tenant="t"))
        queue.submit(sample(None, 1, tenant="t"))
        queue.submit(Call(None, lambda: None))
        queue.close()
        worker.join()
    assert "the observer of batches failed" in caplog.text
    kinds = {report.kind: report for report in reports}
    assert set(kinds) == {"optim_step", "decode", "call"}
    assert kinds["decode"].fill == 1 / 8 and kinds["decode"].tokens == {"t": 1}
    for report in reports:
        assert report.seconds >= 0.0
        assert [waited >= 0.0 for _, waited in report.waited] == [True]
    assert [tenant for tenant, _ in kinds["optim_step"].waited] == ["t"]


def test_training_and_sampling_take_turns_by_time():
    """A clock that every batch and every slice moves by a second of its own."""
    now = [0.0]
    queue, recorder, order = OperationQueue(100), Recorder(), []

    def observe(report: BatchReport) -> None:
        order.append(report.kind)

    def decode(seconds: float) -> list[Any]:
        now[0] += 1.0
        return Recorder.decode(recorder, seconds)

    def optim_step(steps: Sequence[OptimStep]) -> list[Any]:
        now[0] += 3.0
        return list(steps)

    recorder.decode, recorder.optim_step = decode, optim_step  # type: ignore[method-assign]
    for _ in range(4):
        queue.submit(step("a"))
    queue.submit(sample("b", 12))
    queue.close()
    Worker(queue, recorder, observe=observe, clock=lambda: now[0]).join()
    assert order == (["optim_step"] + ["decode"] * 3) * 4
    assert recorder.turns == 12


def test_after_the_engine_is_lost_nothing_runs_that_was_to_follow():
    recorder, queue, ran = Recorder(), OperationQueue(100), []
    worker = Worker(queue, recorder)
    recorder.hold(queue)
    futures = [queue.submit(step(name)) for name in ("deadly", "other")]
    futures.append(queue.submit(Call("deadly", lambda: ran.append(1))))
    recorder.gate.set()
    for number in range(5):
        with pytest.raises(EngineLost):
            futures[number].result(WAIT)
        if number == 0:
            futures.append(queue.submit(Call(None, lambda: ran.append(2))))
            futures.append(queue.submit(sample(None)))
    assert [operation.adapter for operation in worker.lost_with] == ["deadly", "other"]
    assert not ran
    queue.close()
    worker.join()
