"""Who may join the decode loop, and what waits for whom."""

from typing import Any

import pytest

from manylora.scheduler import Call, OperationQueue
from manylora.types import AdamParams, OptimStep, Sample, SamplingParams


def sample(adapter: str | None = None, tenant: str = "", count: int = 1, **settings: Any) -> Sample:
    params = SamplingParams(max_tokens=9)
    return Sample(adapter=adapter, prompts=[[1]] * count, params=params, tenant=tenant, **settings)


def step(adapter: str) -> OptimStep:
    return OptimStep(adapter=adapter, params=AdamParams(lr=1.0))


def test_a_step_waits_until_samples_of_the_living_weights_are_done():
    queue = OperationQueue(100)
    for operation in (sample("a"), sample("a"), step("a"), sample("a"), step("b")):
        queue.submit(operation)
    first, second = queue.admit()
    assert [p.operation.adapter for p in queue.next_batch()] == ["b"]  # others go on
    queue.release(first)
    assert not queue.can_train and queue.admit() == []
    queue.release(second)
    assert [p.operation.adapter for p in queue.next_batch()] == ["a"]
    assert len(queue.admit()) == 1


def test_a_snapshot_holds_nobody_up():
    queue = OperationQueue(100)
    for operation in (sample("a", snapshot="s"), step("a")):
        queue.submit(operation)
    assert queue.next_batch() == []  # in the order of its adapter,
    assert len(queue.admit()) == 1
    assert len(queue.next_batch()) == 1  # but not until it is done


def test_what_belongs_to_no_adapter_has_no_order():
    queue = OperationQueue(100, places=2)
    for operation in (
        Call(None, lambda: None, tenant="t"), sample(None, "t"), sample(None, "t", snapshot="s"),
    ):  # fmt: skip
        queue.submit(operation)
    assert len(queue.admit()) == 1  # one place is left for others
    assert len(queue.next_batch()) == 1
    assert queue.waiting("t") == (1, 10)


def test_a_tenant_alone_leaves_an_eighth_of_the_places():
    queue = OperationQueue(100, places=64)
    for _ in range(100):
        queue.submit(sample(tenant="flooder"))
    admitted = queue.admit()
    assert len(admitted) == 56 and queue.places_held == 56
    assert queue.admit() == []
    queue.release(admitted[0])
    assert len(queue.admit()) == 1


@pytest.mark.parametrize("adapters", [1, 1000])
def test_a_flood_does_not_delay_a_single_request(adapters: int):
    """Not even by one request of the flood: its place is free when it comes."""
    queue = OperationQueue(100, places=64)
    for number in range(1000):
        queue.submit(sample(f"flood-{number % adapters}", "flooder"))
    held = queue.admit()
    for number in range(5):
        queue.submit(sample(f"single-{number}", f"other-{number}"))
        (single,) = queue.admit()
        assert single.operation.tenant == f"other-{number}"
        held.append(single)
    for pending in held:
        queue.release(pending)
    assert queue.places_held == 0


def test_tenants_share_the_places_evenly():
    queue = OperationQueue(100, places=60)
    for tenant in "abc":
        for _ in range(100):
            queue.submit(sample(tenant=tenant))
    admitted = [pending.operation.tenant for pending in queue.admit()]
    counts = [admitted.count(tenant) for tenant in "abc"]
    assert max(counts) - min(counts) <= 1 and sum(counts) < 60


def test_a_request_larger_than_all_places_is_admitted_and_leaves_room():
    queue = OperationQueue(100, places=16)
    queue.submit(sample(tenant="a", count=500))
    queue.submit(sample(tenant="a"))
    queue.submit(sample(tenant="b"))
    admitted = queue.admit()
    assert [(p.operation.tenant, p.places) for p in admitted] == [("a", 500), ("b", 1)]
    for pending in admitted:
        queue.release(pending)
    assert queue.places_held == 0 and len(queue.admit()) == 1


def test_a_request_whose_client_gave_up_is_not_admitted():
    queue = OperationQueue(100)
    gone, kept = queue.submit(sample("a")), queue.submit(sample("a"))
    assert gone.cancel()
    (pending,) = queue.admit()
    assert pending.future is kept
    assert not kept.running()  # it can still be cancelled
    assert queue.waiting("") == (0, 0)


def test_what_waits_is_counted_by_tenant():
    queue = OperationQueue(100)
    for tenant, count in (("a", 3), ("b", 1)):
        for _ in range(count):
            queue.submit(sample("x" + tenant, tenant))
    assert queue.waiting("a") == (3, 30) and queue.waiting("b") == (1, 10)
    assert queue.waiting("nobody") == (0, 0)
    queue.admit()
    assert queue.waiting("a") == (0, 0)


def test_a_suspect_is_in_the_loop_alone():
    queue = OperationQueue(100, apart=lambda operation: operation.adapter == "suspect")
    queue.submit(sample("a", "x"))
    queue.submit(sample("b", "y"))
    others = queue.admit()
    assert len(others) == 2
    queue.submit(sample("suspect", "z"))
    assert queue.admit() == []
    queue.submit(sample("c", "x"))
    queue.release(others[0])
    assert queue.admit() == []  # it is the suspect's turn, once the loop is empty
    queue.release(others[1])
    [suspect] = queue.admit()
    assert suspect.operation.adapter == "suspect"
    assert queue.admit() == []
    queue.submit(sample("d", "y"))
    assert queue.admit() == []
    queue.release(suspect)
    assert sorted(str(pending.operation.adapter) for pending in queue.admit()) == ["c", "d"]
