"""A request that is interrupted answers with the beginning of what it would have become.

Faults that were planted and seen to fail here: a finished continuation that loses its tokens; a
sample that is asked for later ended with the others.
"""

from typing import Any

import numpy as np
import pytest

from manylora import Trainer
from manylora.engine import Engine
from manylora.scheduler import OperationQueue
from manylora.types import (
    AdamParams,
    Cancelled,
    OptimStep,
    Sample,
    SampledSequence,
    SampleResult,
    SamplingParams,
    Scoring,
)
from tests.models import VOCAB
from tests.unit.sampling.test_joining import alone, decoder, engine, request

__all__ = ["engine"]

pytestmark = pytest.mark.usefixtures("threads")
LONG = SamplingParams(max_tokens=100, stop=(), temperature=0.9, seed=3)


def assert_beginning(found: SampledSequence, whole: SampledSequence) -> None:
    count = len(found.tokens)
    assert found.tokens == whole.tokens[:count] and found.logprobs == whole.logprobs[:count]
    if found.stop_reason != "interrupted":
        assert (found.tokens, found.stop_reason) == (whole.tokens, whole.stop_reason)
    if whole.topk is not None:
        assert found.topk is not None
        assert np.array_equal(found.topk.tokens, whole.topk.tokens[:count])
        assert found.topk.tokens.shape == (count, whole.topk.tokens.shape[1])


# --- in the loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 30])
def test_it_answers_with_what_it_has(engine: Engine, steps: int):
    """One in the midst of its prompt, one with few places, and a neighbour that goes on."""
    scoring = Scoring(prompt=True, topk_sampled=3)
    drawn: dict[str, Any] = {"temperature": 0.9, "seed": 5}
    wanted = request("all", 150, 60, num_samples=5, **drawn)
    wanted = Sample(
        adapter="all",
        prompts=[*wanted.prompts, [5, 6]],
        params=wanted.params,
        num_samples=5,
        scoring=scoring,
    )
    neighbour = request("head", 20, 40, num_samples=2, **drawn)
    whole, expected = alone(engine, wanted), alone(engine, neighbour)
    verbs = decoder(engine, max_sequences=6)
    assert verbs.admit([neighbour, wanted]) == [None, None]
    for _ in range(steps):
        assert verbs.decode(0.0) == []
    verbs.interrupt(wanted)
    verbs.interrupt(wanted)
    found: dict[int, Any] = {}
    while verbs.decoding:
        for sample, result in verbs.decode(0.0):
            assert id(sample) not in found
            found[id(sample)] = result
        assert id(wanted) in found  # at once
    assert found[id(neighbour)] == expected
    result = found[id(wanted)]
    assert len(result.sequences) == 10 and len(result.prompts) == 2
    for one, other in zip(result.sequences, whole.sequences, strict=True):
        assert one.stop_reason == "interrupted"
        assert_beginning(one, other)
    for one, other in zip(result.prompts, whole.prompts, strict=True):
        read = ~np.isnan(one.logprobs)
        assert np.array_equal(one.logprobs[read], other.logprobs[read])
    most = max(len(one.tokens) for one in result.sequences)
    assert most <= steps and (steps < 7 or most > 0)
    # All room is free again.
    assert verbs.sample([neighbour]) == [expected]
    assert not verbs.loop._running and not len(verbs.loop)


def test_what_is_finished_keeps_its_end(engine: Engine):
    """The stop token of one continuation ends it; the others are interrupted later."""
    params = SamplingParams(max_tokens=60, temperature=1.5, seed=1, stop=tuple(range(0, VOCAB, 12)))
    wanted = Sample(adapter="all", prompts=[[3, 4, 5]], params=params, num_samples=8)
    whole = alone(engine, wanted)
    lengths = sorted(len(one.tokens) for one in whole.sequences)
    verbs = decoder(engine)
    verbs.admit([wanted])
    for _ in range(lengths[3] + 1):
        assert verbs.decode(0.0) == []
    verbs.interrupt(wanted)
    ((sample, result),) = verbs.decode(0.0)
    assert sample is wanted and isinstance(result, SampleResult)
    assert {one.stop_reason for one in result.sequences} == {"stop", "interrupted"}
    for one, other in zip(result.sequences, whole.sequences, strict=True):
        assert_beginning(one, other)
        assert (one.stop_reason == "stop") == (len(one.tokens) == len(other.tokens))


def test_what_is_not_there_is_passed_over(engine: Engine):
    verbs = decoder(engine)
    done = request("all", 5, 3)
    verbs.sample([done])
    verbs.interrupt(done)
    assert not verbs.decoding and verbs.decode(0.0) == []
    verbs.admit([done])
    verbs.interrupt(done)
    verbs.cancel(done)
    assert not verbs.decoding and verbs.decode(0.0) == []


# --- in the queue -----------------------------------------------------------------------------


def waiting(adapter: str | None, **settings: Any) -> Sample:
    return Sample(adapter=adapter, prompts=[[1], [2]], params=LONG, num_samples=3, **settings)


def test_what_waits_is_answered_and_what_stands_behind_goes_on():
    queue = OperationQueue(100, places=6)
    first = queue.submit(waiting("a"))
    (running,) = queue.admit()
    ended = [queue.submit(waiting("a")), queue.submit(waiting("a", snapshot="s"))]
    behind = OptimStep(adapter="a", params=AdamParams(lr=1.0))
    queue.submit(behind)
    others = [queue.submit(waiting("b")), queue.submit(waiting(None, snapshot="s"))]
    future = queue.interrupt("a")
    later = queue.submit(waiting("a"))
    for one in ended:
        assert one.result() == SampleResult((SampledSequence((), (), "interrupted"),) * 6)
    assert not any(one.done() for one in (first, later, future, *others))
    (interrupt,) = queue.interrupts()
    assert interrupt.concerns(running) and queue.interrupts() == []
    queue.release(running)
    assert [pending.operation for pending in queue.next_batch()] == [behind]
    assert queue.waiting("")[0] == 3
    found = []
    while batch := queue.admit():
        found += batch
        for pending in batch:
            queue.release(pending)
    assert len(found) == 3 and not any(interrupt.concerns(pending) for pending in found)
    queue.close()
    assert queue.drained
    with pytest.raises(Cancelled):
        queue.interrupt("a")


# --- through handles --------------------------------------------------------------------------


@pytest.fixture
def trainer(tiny):
    with Trainer(tiny("llama")) as trainer:
        yield trainer


def test_an_adapters_samples_end_and_no_others(trainer):
    adapter, other = (trainer.create(name, rank=2) for name in ("a", "b"))
    snapshot = adapter.snapshot()
    whole = snapshot.sample([[1, 2]], LONG, num_samples=4).result()
    futures = [one.sample([[1, 2]], LONG, num_samples=4) for one in (adapter, snapshot, other)]
    behind = adapter.sample([[1, 2]], LONG, num_samples=200)
    assert adapter.interrupt().result() is None
    later = adapter.sample([[1, 2]], LONG, num_samples=4)
    *ended, kept = (future.result() for future in futures)
    for result in ended:
        for found, expected in zip(result.sequences, whole.sequences, strict=True):
            assert_beginning(found, expected)
        assert any(one.stop_reason == "interrupted" for one in result.sequences)
    assert {one.stop_reason for one in behind.result().sequences} == {"interrupted"}
    for result in (kept, later.result()):
        assert {one.stop_reason for one in result.sequences} == {"length"}
    assert later.result() == whole
    assert adapter.interrupt().result() is None  # with nothing there
    assert adapter.optim_step(lr=0.1).result().step == 1
