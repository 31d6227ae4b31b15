"""The engine's thread: results reach their futures, and a raising batch ends nothing."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from manylora.scheduler import Call, OperationQueue, Worker
from manylora.types import AdamParams, DataError, ForwardBackward, OptimStep, Sample

WAIT = 20  # seconds that a healthy thread never needs


class Recorder:
    """An engine that notes what it is given; adapters named `bad…` fail in some way."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

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
        return [DataError("bad data") if op.adapter == "bad-data" else op for op in operations]

    def forward_backward(self, works: Sequence[ForwardBackward]) -> list[Any]:
        return self._run(works)

    def optim_step(self, steps: Sequence[OptimStep]) -> list[Any]:
        return self._run(steps)

    def sample(self, requests: Sequence[Sample]) -> list[Any]:
        return self._run(requests)


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


def test_every_kind_goes_to_its_verb_on_one_thread(rig):
    queue, recorder = rig
    operations = [
        step("a"),
        ForwardBackward(adapter="a", data=[]),
        Sample(adapter=None, prompts=[]),
    ]
    futures = [queue.submit(operation) for operation in operations]
    called = queue.submit(Call(None, lambda: threading.current_thread().name))
    assert [future.result(WAIT) for future in futures] == operations
    assert recorder.threads == {called.result(WAIT)} == {"manylora-engine"}


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
