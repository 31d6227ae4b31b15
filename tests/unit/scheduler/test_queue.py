"""Order within an adapter, merging between adapters, and token-fair shares."""

import random

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


def work(adapter: str, tokens: int = 10) -> ForwardBackward:
    zeros = np.zeros(tokens, np.int64)
    return ForwardBackward(adapter=adapter, data=[Datum(zeros, {"target_tokens": zeros})])


def step(adapter: str) -> OptimStep:
    return OptimStep(adapter=adapter, params=AdamParams(lr=1.0))


def sample(adapter: str | None, tokens: int = 10) -> Sample:
    params = SamplingParams(max_tokens=tokens - 1)
    return Sample(adapter=adapter, prompts=[[1]], params=params)


def names(batch: list[Pending]) -> list[str | None]:
    return [pending.operation.adapter for pending in batch]


def drain(queue: OperationQueue) -> list[list[Pending]]:
    queue.close()
    batches = []
    while not queue.drained:
        batches.append(queue.next_batch())
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
    for operation in (work("a"), work("a"), step("a"), work("a")):
        queue.submit(operation)
    assert [len(batch) for batch in drain(queue)] == [2, 1, 1]


def test_a_call_has_the_engine_for_itself():
    queue = OperationQueue(BUDGET)
    queue.submit(work("a"))
    queue.submit(Call("b", lambda: None))
    queue.submit(Call(None, lambda: None))
    batches = drain(queue)
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert all(isinstance(batch[0].operation, Call) for batch in batches[:2])


def test_training_and_sampling_take_turns():
    queue = OperationQueue(BUDGET)
    for _ in range(3):
        queue.submit(work("a", BUDGET))
        queue.submit(sample("b", BUDGET))
    kinds = [type(batch[0].operation) for batch in drain(queue)]
    assert kinds == [Sample, ForwardBackward] * 3


def test_one_batch_is_of_one_kind_within_the_budget():
    """Random operations of random sizes: order within a lane, one kind, nothing lost."""
    for seed in range(60):
        rng = random.Random(seed)
        queue = OperationQueue(BUDGET)
        submitted: dict[str, list] = {name: [] for name in "abcd"}
        batches = []
        for _ in range(40):
            name = rng.choice("aaabcd")
            size = rng.randint(2, 150)
            operation = rng.choice(
                [work(name, size), work(name, size), sample(name, size), step(name)]
            )
            queue.submit(operation)
            submitted[name].append(operation)
            if rng.random() < 0.3:
                batches.append(queue.next_batch())
        batches += drain(queue)
        ran = [pending.operation for batch in batches for pending in batch]
        for name, operations in submitted.items():
            assert [op for op in ran if op.adapter == name] == operations
        for batch in batches:
            assert len({type(pending.operation) for pending in batch}) == 1
            assert len(batch) == 1 or sum(pending.tokens for pending in batch) <= BUDGET


@pytest.mark.parametrize("size", [1, 10, 50])
def test_a_flood_delays_a_single_request_by_one_batch_at_most(size: int):
    for flood in (10, 33, 50, 100):
        queue = OperationQueue(BUDGET)
        for _ in range(200):
            queue.submit(work("flood", flood))
        queue.next_batch()
        queue.next_batch()
        queue.submit(work("single", size))
        assert "single" in names(queue.next_batch()) + names(queue.next_batch()), flood


def test_a_large_request_is_served_while_others_flood():
    """It saves up its share of each round: no more rounds than its tokens are shares."""
    for lanes in (1, 3):
        queue = OperationQueue(BUDGET)
        for lane in range(lanes):
            for _ in range(200):
                queue.submit(work(f"flood-{lane}", 10))
        queue.submit(work("large", 3 * BUDGET))
        served = next(i for i in range(50) if "large" in names(queue.next_batch()))
        assert served <= 3 * (lanes + 1) + 1


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
