"""Sequence numbers rule: replays, gaps and requests that overtake each other change nothing."""

from collections.abc import Iterator

import numpy as np
import pytest

from manylora.types import AdamParams
from tests.wire.data import FIRST_PLAIN_TOKEN, assert_close, assert_same_bits, outputs, random_data
from tests.wire.oracle import Oracle
from tests.wire.raw import RawClient
from tests.wire.server import BASE_ALIAS, Server

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 3)
PROMPT = tuple(range(FIRST_PLAIN_TOKEN, FIRST_PLAIN_TOKEN + 6))


@pytest.fixture
def raw(server: Server) -> Iterator[RawClient]:
    client = RawClient(server)
    client.open_session()
    yield client
    client.close()


def probe(raw: RawClient, model_id: str, seq_id: int) -> list[np.ndarray]:
    answer = raw.ok(raw.forward_backward(model_id, seq_id, PROBE, forward_only=True))
    return outputs(raw.losses(answer["request_id"]))


def in_order(raw: RawClient, model_id: str, pairs: int) -> list[np.ndarray]:
    """The plan of these tests, submitted one by one: seq 1 … 2·pairs, then a probe."""
    for number in range(pairs):
        data = random_data(500 + number, 3)
        raw.ok(raw.forward_backward(model_id, 2 * number + 1, data))
        raw.ok(raw.optim_step(model_id, 2 * number + 2, STEP))
    return probe(raw, model_id, 2 * pairs + 1)


def test_an_adapter_trained_without_the_sdk_is_the_oracles(raw: RawClient):
    given = in_order(raw, raw.new_model(0), pairs=2)
    oracle = Oracle(4, 1)
    for number in range(2):
        oracle.forward_backward(random_data(500 + number, 3))
        oracle.step(STEP)
    assert_close(given, oracle.logprobs(PROBE), 1e-4)


def test_a_repeated_submit_gets_the_same_future_and_is_done_once(raw: RawClient):
    expected = in_order(raw, raw.new_model(0), pairs=2)
    model_id = raw.new_model(1)
    for number in range(2):
        data = random_data(500 + number, 3)
        fb = [raw.ok(raw.forward_backward(model_id, 2 * number + 1, data)) for _ in range(3)]
        step = [raw.ok(raw.optim_step(model_id, 2 * number + 2, STEP)) for _ in range(3)]
        again = raw.ok(raw.forward_backward(model_id, 2 * number + 1, data))  # after the step
        for answers in ([*fb, again], step):
            assert len({answer["request_id"] for answer in answers}) == 1
    assert_same_bits(probe(raw, model_id, 5), expected)


def test_the_same_number_with_another_body_is_refused(raw: RawClient):
    model_id = raw.new_model(0)
    raw.ok(raw.forward_backward(model_id, 1, random_data(1, 2)))
    other = raw.forward_backward(model_id, 1, random_data(2, 2))
    assert other.status_code == 400, other.text
    raw.ok(raw.optim_step(model_id, 2, STEP))
    changed = raw.optim_step(model_id, 2, AdamParams(lr=1.0))
    assert changed.status_code == 400, changed.text
    expected = in_order(raw, raw.new_model(1), pairs=0)
    assert len(probe(raw, model_id, 3)) == len(expected)


@pytest.mark.parametrize("order", ["reversed", "first last", "shuffled"])
def test_requests_may_arrive_in_any_order(raw: RawClient, order: str):
    pairs = 4
    expected = in_order(raw, raw.new_model(0), pairs)
    model_id = raw.new_model(1)
    numbers = list(range(1, 2 * pairs + 1))
    if order == "reversed":
        numbers.reverse()
    elif order == "first last":
        numbers = [*numbers[1:], 1]
    else:
        np.random.default_rng(4).shuffle(numbers)
    futures = {}
    for seq in numbers:
        if seq % 2:
            data = random_data(500 + seq // 2, 3)
            futures[seq] = raw.ok(raw.forward_backward(model_id, seq, data))["request_id"]
        else:
            futures[seq] = raw.ok(raw.optim_step(model_id, seq, STEP))["request_id"]
    for seq in numbers:
        result = raw.result(futures[seq])
        assert isinstance(result, bytes) or "error" not in result, result
    assert_same_bits(probe(raw, model_id, 2 * pairs + 1), expected)


def test_a_gap_holds_back_what_comes_after_it(raw: RawClient):
    expected = in_order(raw, raw.new_model(0), pairs=1)
    model_id = raw.new_model(1)
    step = raw.ok(raw.optim_step(model_id, 2, STEP))["request_id"]
    late = raw.ok(raw.forward_backward(model_id, 3, PROBE, forward_only=True))["request_id"]
    # Other models go on meanwhile.
    in_order(raw, raw.new_model(2), pairs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw.http, "timeout", 1.0)
        for request_id in (step, late):
            with pytest.raises(Exception, match="timed out"):
                raw.poll(request_id)
    raw.ok(raw.forward_backward(model_id, 1, random_data(500, 3)))
    assert "error" not in raw.result(step)
    assert_same_bits(outputs(raw.losses(late)), expected)


def test_results_can_be_read_again_and_again(raw: RawClient):
    model_id = raw.new_model(0)
    request_id = raw.ok(raw.forward_backward(model_id, 1, random_data(7, 3)))["request_id"]
    first = raw.result(request_id)
    step = raw.ok(raw.optim_step(model_id, 2, STEP))["request_id"]
    raw.result(step)
    assert [raw.result(request_id) for _ in range(3)] == [first] * 3


def test_models_and_samplers_are_made_once(raw: RawClient):
    made = [raw.ok(raw.create_model(0)) for _ in range(3)]
    assert len({answer["request_id"] for answer in made}) == 1
    assert raw.result(made[0]["request_id"])["model_id"] == f"{raw.session_id}:train:0"
    assert raw.create_model(0, rank=8).status_code == 400
    samplers = [raw.ok(raw.new_sampler(0))["sampling_session_id"] for _ in range(3)]
    assert len(set(samplers)) == 1
    assert raw.new_sampler(0, base_model="no/such-model").status_code == 400
    other = raw.ok(raw.new_sampler(1))["sampling_session_id"]
    assert other != samplers[0]


def test_samples_are_drawn_once_and_in_no_order(raw: RawClient):
    sampler = raw.ok(raw.new_sampler(0))["sampling_session_id"]
    far = 17 * 10**9 + 3  # what a copy of a client in another process counts from
    answers = [raw.ok(raw.sample(sampler, seq, PROMPT, num_samples=2)) for seq in (far, 5, 0, 5)]
    assert answers[1] == answers[3]
    assert len({answer["request_id"] for answer in answers}) == 3
    ids = [identity for answer in answers[:3] for identity in answer["sample_sequence_ids"]]
    assert len(set(ids)) == 6
    assert all(ids)
    drawn = [raw.samples(answer["request_id"]) for answer in answers]
    for one in drawn[1:]:  # the same seed and prompt
        assert [list(seq.tokens_np) for seq in one.sequences] == [
            list(seq.tokens_np) for seq in drawn[0].sequences
        ]


def test_the_first_finish_of_a_session_counts(raw: RawClient):
    model_id = raw.new_model(0)
    for kind in ("success", "errored"):
        answer = raw.post(f"sessions/{raw.session_id}/finish", reason={"type": kind})
        assert answer.is_success, answer.text
    late = raw.forward_backward(model_id, 1, PROBE)
    assert 400 <= late.status_code < 500
    assert late.status_code not in (408, 409, 429)  # the SDK would try again for five minutes
    assert raw.post("session_heartbeat", session_id=raw.session_id).status_code == 410


@pytest.mark.slow
def test_a_poll_of_pending_work_is_held_and_then_says_so(raw: RawClient):
    """An instant answer would be asked again at once; 45 seconds is where the SDK gives up."""
    model_id = raw.new_model(0)
    pending = raw.ok(raw.optim_step(model_id, 2, STEP))["request_id"]
    answer = raw.poll(pending)
    assert 15.0 < answer.elapsed.total_seconds() < 42.0
    assert answer.status_code == 408
    assert answer.json()["queue_state"] in {"active", "paused_capacity", "paused_rate_limit"}


def test_the_base_can_be_named_by_its_aliases_only(raw: RawClient):
    assert raw.new_sampler(0, base_model=BASE_ALIAS).status_code == 200
    refused = raw.new_sampler(1, base_model="Qwen/Qwen3-32B")
    assert 400 <= refused.status_code < 500
    assert BASE_ALIAS in refused.text  # what there is
