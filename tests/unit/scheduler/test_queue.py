"""Order within an adapter, merging between adapters, and token-fair shares."""

import random
import time
from typing import Any

import numpy as np
import pytest

from manylora.scheduler import Call, OperationQueue, Pending
from manylora.types import (
    AdamParams,
    Cancelled,
    Datum,
    ForwardBackward,
    OptimStep,
    Sample,
    SamplingParams,
)

BUDGET = 100


def work(adapter: str, tokens: int = 10, tenant: str = "") -> ForwardBackward:
    zeros = np.zeros(tokens, np.int64)
    data = [Datum(zeros, {"target_tokens": zeros})]
    return ForwardBackward(adapter=adapter, data=data, tenant=tenant)


def step(adapter: str, tenant: str = "") -> OptimStep:
    return OptimStep(adapter=adapter, params=AdamParams(lr=1.0), tenant=tenant)


def sample(adapter: str | None, **settings: Any) -> Sample:
    return Sample(adapter=adapter, prompts=[[1]], params=SamplingParams(max_tokens=9), **settings)


def names(batch: list[Pending]) -> list[str | None]:
    return [pending.operation.adapter for pending in batch]


def drain(queue: OperationQueue) -> list[list[Pending]]:
    """Batches until nothing is left; samples are finished at once."""
    queue.close()
    batches = []
    while not queue.drained:
        for batch in (queue.admit(), queue.next_batch()):
            batches += [batch] if batch else []
            for pending in batch:
                if isinstance(pending.operation, Sample):
                    queue.release(pending)
    return batches


def test_what_stands_at_the_heads_is_merged():
    queue = OperationQueue(BUDGET)
    for adapter in "abc":
        queue.submit(work(adapter))
        queue.submit(step(adapter))
    batches = [names(batch) for batch in drain(queue)]
    assert batches == [["a", "b", "c"], ["a", "b", "c"]]


def test_several_calls_of_one_adapter_fill_one_batch_but_not_past_its_step():
    queue = OperationQueue(BUDGET)
    for operation in (work("a"), work("a"), step("a"), work("a"), step("a"), step("a")):
        queue.submit(operation)
    assert [len(batch) for batch in drain(queue)] == [2, 1, 1, 1, 1]


def test_a_call_has_the_engine_for_itself():
    queue = OperationQueue(BUDGET)
    queue.submit(work("a"))
    queue.submit(Call("b", lambda: None))
    queue.submit(Call(None, lambda: None))
    batches = drain(queue)
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert isinstance(batches[0][0].operation, Call)


def test_a_suspect_runs_in_a_batch_of_its_own():
    queue = OperationQueue(100, max_adapters=3, apart=lambda operation: operation.adapter == "b")
    for adapter in "abcb":
        queue.submit(work(adapter))
    for adapter in "abc":
        queue.submit(step(adapter))
    batches = drain(queue)
    for kind in (ForwardBackward, OptimStep):
        found = [names(batch) for batch in batches if isinstance(batch[0].operation, kind)]
        assert all(batch == ["b"] for batch in found if "b" in batch)
        assert ["a", "c"] in [sorted(map(str, batch)) for batch in found]  # the others are merged


@pytest.mark.parametrize("flood", [Call, OptimStep, ForwardBackward])
def test_no_kind_keeps_the_others_out(flood: type):
    make = {
        Call: lambda name: Call(name, lambda: None),
        OptimStep: step,
        ForwardBackward: lambda name: work(name, BUDGET),
    }
    queue = OperationQueue(BUDGET)
    for _ in range(100):
        queue.submit(make[flood]("flood"))
    queue.next_batch()
    for kind in set(make) - {flood}:
        queue.submit(make[kind](kind.__name__))
    first = {type(queue.next_batch()[0].operation) for _ in range(3)}
    assert first == set(make)


def test_one_batch_is_of_one_kind_within_the_budget():
    """Random operations of random sizes: order within a lane, one kind, nothing lost."""
    for seed in range(60):
        rng = random.Random(seed)
        limit = rng.choice([None, 1, 2])
        queue = OperationQueue(BUDGET, max_adapters=limit, places=5)
        submitted: dict[str, list[Any]] = {name: [] for name in "abcd"}
        batches, decoding = [], []
        for _ in range(60):
            name = rng.choice("aaabcd")
            size = rng.randint(2, 150)
            operation = rng.choice([work(name, size), work(name, size), sample(name), step(name)])
            queue.submit(operation)
            submitted[name].append(operation)
            if rng.random() < 0.3:
                batches += [queue.next_batch(), admitted := queue.admit()]
                decoding += admitted
            if decoding and rng.random() < 0.5:
                queue.release(decoding.pop(rng.randrange(len(decoding))))
        for pending in decoding:
            queue.release(pending)
        batches = [batch for batch in [*batches, *drain(queue)] if batch]
        ran = [pending.operation for batch in batches for pending in batch]
        for name, operations in submitted.items():
            own = [op for op in ran if op.adapter == name]
            assert len(own) == len(operations)
            assert all(x is y for x, y in zip(own, operations, strict=True))
        for batch in batches:
            kinds = {type(pending.operation) for pending in batch}
            assert len(kinds) == 1
            assert len(set(names(batch))) <= (limit or 4)
            if kinds == {ForwardBackward}:
                assert len(batch) == 1 or sum(pending.tokens for pending in batch) <= BUDGET
            if kinds == {OptimStep}:
                assert len(set(names(batch))) == len(batch)
        assert queue.waiting("") == (0, 0)


@pytest.mark.parametrize("size", [1, 10, 50, 100, 1000])
@pytest.mark.parametrize("flood", [10, 33, 50, 100])
@pytest.mark.parametrize("adapters", [1, 1000])
def test_a_flood_delays_a_single_request_by_one_batch_at_most(size: int, flood: int, adapters: int):
    """The one that runs: the request is in the next, whatever its size and theirs."""
    queue = OperationQueue(BUDGET)
    for number in range(1000):
        queue.submit(work(f"flood-{number % adapters}", flood, "flooder"))
    for _ in range(3):
        queue.next_batch()
    queue.submit(work("single", size, "other"))
    assert "single" in names(queue.next_batch())


def test_a_batch_is_filled_with_what_fits():
    queue = OperationQueue(BUDGET)
    for name, size in (("a", 60), ("b", 60), ("c", 40)):
        queue.submit(work(name, size))
    assert [names(batch) for batch in drain(queue)] == [["a", "c"], ["b"]]


def test_a_batch_has_so_many_adapters_at_most_and_more_of_those():
    queue = OperationQueue(BUDGET, max_adapters=2)
    for name in "abcde":
        for _ in range(3):
            queue.submit(work(name))
        queue.submit(step(name))
    batches = [names(batch) for batch in drain(queue)]
    assert batches[0] == ["a", "b", "a", "b", "a", "b"]
    assert all(len(set(batch)) <= 2 for batch in batches)
    assert sum(len(batch) for batch in batches) == 20


def test_a_tenant_has_its_share_however_many_adapters_it_has():
    queue = OperationQueue(BUDGET)
    for number in range(300):
        queue.submit(work(f"many-{number % 30}", 10, "many"))
        queue.submit(work("one", 10, "one"))
    served = {"many": 0, "one": 0}
    for _ in range(20):
        for pending in queue.next_batch():
            served[pending.operation.tenant] += pending.tokens
    assert served == {"many": 1000, "one": 1000}


def test_a_client_that_waits_for_each_result_takes_no_more_than_its_share():
    """It leaves the queue after every operation; what it owes it still owes."""
    queue = OperationQueue(BUDGET)
    for _ in range(200):
        queue.submit(work("flood", 50, "flooder"))
    served = {"waiter": 0, "flooder": 0}
    queue.submit(work("big", 1000, "waiter"))
    for _ in range(60):
        for pending in queue.next_batch():
            served[pending.operation.tenant] += pending.tokens
            if pending.operation.tenant == "waiter":
                queue.submit(work("big", 1000, "waiter"))
    assert abs(served["waiter"] - served["flooder"]) <= 1000, served


def test_choosing_costs_nothing_like_what_is_queued():
    """Ten thousand operations wait; the fastest of many choices, so that a busy machine is no
    fault."""
    for adapters in (1, 1000, 10_000):
        queue = OperationQueue(BUDGET)
        for number in range(10_000):
            queue.submit(work(f"{number % adapters}", 25, f"tenant-{number % min(adapters, 8)}"))
        took = []
        for _ in range(100):
            began = time.perf_counter()
            assert len(queue.next_batch()) == 4
            took.append(time.perf_counter() - began)
        assert min(took) < 1e-3, adapters


def test_tokens_are_shared_evenly_whatever_their_sizes():
    sizes = {"small": 3, "middle": 20, "large": 45}
    queue = OperationQueue(BUDGET)
    for name, size in sizes.items():
        for _ in range(6000 // size):
            queue.submit(work(name, size))
    served = dict.fromkeys(sizes, 0)
    for _ in range(60):
        for pending in queue.next_batch():
            assert pending.operation.adapter is not None
            served[pending.operation.adapter] += pending.tokens
    assert max(served.values()) - min(served.values()) <= 2 * BUDGET, served


def test_an_idle_lane_saves_nothing_up():
    """Who was away cannot crowd out those who stayed."""
    queue = OperationQueue(BUDGET)
    for _ in range(100):
        queue.submit(work("steady", 10))
    queue.submit(work("guest", 10))
    for _ in range(5):
        queue.next_batch()
    for _ in range(50):
        queue.submit(work("guest", 10))
    served = [names(queue.next_batch()) for _ in range(4)]
    assert all(abs(batch.count("guest") - batch.count("steady")) <= 2 for batch in served), served


def test_a_request_beyond_the_budget_runs():
    queue = OperationQueue(BUDGET)
    queue.submit(work("a", 10 * BUDGET))
    assert [names(batch) for batch in drain(queue)] == [["a"]]


def test_what_was_cancelled_by_its_client_does_not_run():
    queue = OperationQueue(BUDGET)
    first, second = queue.submit(work("a")), queue.submit(work("a"))
    assert first.cancel()
    (pending,) = queue.next_batch()
    assert pending.future is second and second.running()


def test_closing():
    queue = OperationQueue(BUDGET)
    kept = queue.submit(work("a"))
    queue.close()
    assert not queue.drained
    with pytest.raises(Cancelled, match="closed"):
        queue.submit(work("a"))
    assert len(queue.next_batch()) == 1 and queue.drained
    assert queue.next_batch() == []
    assert not kept.cancelled()


def test_dropping_what_waits():
    queue = OperationQueue(BUDGET)
    running = queue.submit(step("a"))
    queue.next_batch()
    waiting = [queue.submit(work(name)) for name in "ab"]
    assert waiting[1].cancel()  # by its client, before
    queue.close()
    queue.cancel_waiting()
    assert queue.drained
    assert isinstance(waiting[0].exception(timeout=0), Cancelled)
    assert waiting[1].cancelled()
    assert running.running()
