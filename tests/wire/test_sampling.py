"""Sampling through the SDK: whose weights, which tokens, which log-probabilities.

M tokens of a prompt, k likeliest tokens of a place, V vocabulary.
"""

import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest
import tinker
import torch

from manylora.types import AdamParams, Datum
from tests.wire.data import (
    FIRST_PLAIN_TOKEN,
    VOCAB,
    assert_close,
    assert_same_bits,
    differ,
    forward,
    prompt_scores,
    random_data,
    scores,
    sdk_adam,
    seedling_tokenizer,
    to_sdk,
)
from tests.wire.oracle import Oracle
from tests.wire.server import BASE_ALIAS, CHAT_ALIAS, Server

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 3)
TOLERANCE = 1e-4  # between what sampling reports and what forward gives
PROMPT = random_data(7, 1, lengths=(12, 13))[0].tokens.tolist()


def create(service: tinker.ServiceClient, seed: int = 1) -> tinker.TrainingClient:
    return service.create_lora_training_client(BASE_ALIAS, rank=4, seed=seed).result()


def train(client: tinker.TrainingClient, *seeds: int) -> None:
    for seed in seeds:
        client.forward_backward(to_sdk(random_data(seed, 4)), "cross_entropy").result()
        client.optim_step(sdk_adam(STEP)).result()


def sample(
    sampler: tinker.SamplingClient, prompt: list[int] | None = None, **settings: Any
) -> tinker.SampleResponse:
    names = tinker.SamplingParams.model_fields
    params = {"max_tokens": 12, "seed": 3} | {k: v for k, v in settings.items() if k in names}
    extra = {k: v for k, v in settings.items() if k not in names}
    return sampler.sample(
        tinker.ModelInput.from_ints(PROMPT if prompt is None else prompt),
        extra.pop("num_samples", 1),
        tinker.SamplingParams.model_validate(params),
        **extra,
    ).result()


def next_logits(oracle: Oracle, tokens: list[int]) -> torch.Tensor:
    """[M, V]: what the reference model says after each token."""
    with torch.no_grad():
        return oracle.reference.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.fixture(scope="module")
def base(server: Server):
    """A sampler of the bare base, and the oracle of it."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
    yield service.create_sampling_client(base_model=BASE_ALIAS).result(), Oracle(1, 0)
    service.close("success").result()


def test_a_snapshot_stays_as_it_was_while_training_goes_on(service: tinker.ServiceClient):
    client = create(service)
    samplers, expected = [], []
    for seed in (1, 2, 3):
        train(client, seed)
        samplers.append(client.save_weights_and_get_sampling_client().result())
        expected.append(forward(client, PROBE))
    assert differ(expected[0], expected[2])
    for sampler, logprobs in zip(samplers, expected, strict=True):
        assert_close([scores(sampler, datum) for datum in PROBE], logprobs, TOLERANCE)


def test_a_snapshot_is_taken_at_its_place_in_the_order(service: tinker.ServiceClient):
    client, plain = create(service), create(service)
    train(plain, 1)
    first = client.forward_backward(to_sdk(random_data(1, 4)), "cross_entropy")
    client.optim_step(sdk_adam(STEP))
    snapshot = client.save_weights_and_get_sampling_client()
    client.forward_backward(to_sdk(random_data(2, 4)), "cross_entropy")
    client.optim_step(sdk_adam(STEP)).result()
    first.result()
    given = [scores(snapshot.result(), datum) for datum in PROBE]
    assert_close(given, forward(plain, PROBE), TOLERANCE)


def test_a_live_sampler_follows_its_saves(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1)
    live = client.save_weights_and_get_sampling_client(kind="inflight").result()
    train(client, 2)
    newer = client.save_weights_and_get_sampling_client(kind="inflight").result()
    expected = forward(client, PROBE)
    for sampler in (newer, live):
        assert_close([scores(sampler, d) for d in PROBE], expected, TOLERANCE)


def test_scores_of_the_base_are_the_references(base):
    sampler, oracle = base
    given = [scores(sampler, datum) for datum in PROBE]
    assert_close(given, oracle.logprobs(PROBE), TOLERANCE)


def test_sampled_log_probabilities_are_those_of_a_forward(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1, 2)
    sampler = client.save_weights_and_get_sampling_client().result()
    answer = sample(sampler, num_samples=3, temperature=1.0, stop=[])
    for sequence in answer.sequences:
        tokens = [*PROMPT, *sequence.tokens]
        targets = np.array(tokens[1:])
        datum = Datum(np.array(tokens[:-1]), {"target_tokens": targets, "weights": targets * 0.0})
        expected = forward(client, [datum])[0][len(PROMPT) - 1 :]
        assert_close([np.array(sequence.logprobs, dtype=np.float32)], [expected], TOLERANCE)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 1.7])
def test_log_probabilities_are_of_the_scaled_distribution(base, temperature: float):
    sampler, oracle = base
    (sequence,) = sample(sampler, temperature=temperature, stop=[]).sequences
    tokens = [*PROMPT, *sequence.tokens]
    logits_MV = next_logits(oracle, tokens)[len(PROMPT) - 1 : -1] / temperature
    expected = torch.log_softmax(logits_MV, dim=-1).gather(
        1, torch.tensor(sequence.tokens)[:, None]
    )[:, 0]
    assert_close([np.array(sequence.logprobs, dtype=np.float32)], [expected.numpy()], TOLERANCE)


def test_temperature_nought_takes_the_likeliest(base):
    sampler, oracle = base
    (sequence,) = sample(sampler, temperature=0.0, stop=[], max_tokens=8).sequences
    tokens = list(PROMPT)
    for token in sequence.tokens:
        assert token == int(next_logits(oracle, tokens)[-1].argmax())
        tokens.append(token)


def test_a_seed_says_it_all(base):
    sampler, _ = base
    one, two, other = (sample(sampler, num_samples=4, seed=s, stop=[]) for s in (3, 3, 4))
    drawn = [[s.tokens for s in answer.sequences] for answer in (one, two, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(tokens) for tokens in drawn[0]}) > 1  # the samples of one request differ
    assert len({s.sequence_id for answer in (one, two) for s in answer.sequences}) == 8


def test_without_a_seed_answers_differ(base):
    sampler, _ = base
    drawn = {tuple(sample(sampler, seed=None, stop=[]).sequences[0].tokens) for _ in range(4)}
    assert len(drawn) > 1


def test_top_k_and_top_p_leave_the_likely_ones(base):
    sampler, oracle = base
    likely = next_logits(oracle, PROMPT)[-1].topk(3).indices.tolist()
    answer = sample(sampler, num_samples=30, max_tokens=1, top_k=3, temperature=3.0, stop=[])
    drawn = {s.tokens[0] for s in answer.sequences}
    assert drawn <= set(likely)
    assert len(drawn) > 1
    answer = sample(sampler, num_samples=10, max_tokens=1, top_p=1e-6, stop=[])
    assert {s.tokens[0] for s in answer.sequences} == {likely[0]}


def test_a_stop_token_is_the_last_one_given(base):
    sampler, _ = base
    free = sample(sampler, stop=[], max_tokens=16).sequences[0]
    assert free.stop_reason == "length"
    assert len(free.tokens) == 16
    stop = free.tokens[5]
    stopped = sample(sampler, stop=[stop], max_tokens=16).sequences[0]
    length = free.tokens.index(stop) + 1
    assert stopped.tokens == free.tokens[:length]
    assert stopped.stop_reason == "stop"
    assert stopped.logprobs is not None
    assert len(stopped.logprobs) == length


def test_a_stop_string_ends_the_answer_that_contains_it(base):
    tokenizer = seedling_tokenizer()
    sampler, _ = base
    prompt = tokenizer.encode("Mia found a red ball. Tom")
    free = sample(sampler, prompt, stop=[], max_tokens=24, temperature=0.0).sequences[0].tokens
    text = tokenizer.decode(free)
    stop = text[6:9]  # it need not begin or end where a token does
    for given in (stop, [stop], ["never said", stop]):
        sequence = sample(sampler, prompt, stop=given, max_tokens=24, temperature=0.0).sequences[0]
        assert sequence.tokens == free[: len(sequence.tokens)]
        assert sequence.stop_reason == "stop"
        assert stop in tokenizer.decode(sequence.tokens)
        assert stop not in tokenizer.decode(sequence.tokens[:-1])


def test_the_models_own_end_stops_unless_nothing_may(base):
    """`stop` absent is the end-of-sequence token, an empty list is nothing at all."""
    tokenizer = seedling_tokenizer()
    prompt = tokenizer.encode("<|im_start|>user\nReverse cat.<|im_end|>\n<|im_start|>assistant\n")
    sampler, _ = base
    ended = sample(sampler, prompt, temperature=0.0, max_tokens=30).sequences[0]
    assert ended.stop_reason == "stop"
    assert ended.tokens[-1] in (0, 2)
    endless = sample(sampler, prompt, temperature=0.0, max_tokens=30, stop=[]).sequences[0]
    assert endless.stop_reason == "length"
    assert len(endless.tokens) == 30
    assert endless.tokens[: len(ended.tokens)] == ended.tokens


def test_the_likeliest_tokens_of_the_prompt(base):
    sampler, oracle = base
    answer = sample(sampler, max_tokens=1, include_prompt_logprobs=True, topk_prompt_logprobs=5)
    logprobs_MV = torch.log_softmax(next_logits(oracle, PROMPT), dim=-1)
    rows = answer.topk_prompt_logprobs
    assert rows is not None
    assert rows[0] is None
    assert len(rows) == len(PROMPT)
    for row, expected_V in zip(rows[1:], logprobs_MV[:-1], strict=True):
        best = expected_V.topk(5)
        assert row is not None
        given = np.array([value for _, value in row], dtype=np.float32)
        assert_close([given], [best.values.numpy()], TOLERANCE)
        assert [token for token, _ in row] == best.indices.tolist()


def test_the_likeliest_tokens_of_the_answer(base):
    sampler, oracle = base
    (sequence,) = sample(sampler, stop=[], max_tokens=5, topk_sample_logprobs=4).sequences
    rows = sequence.topk_logprobs
    assert rows is not None
    logits_MV = next_logits(oracle, [*PROMPT, *sequence.tokens])[len(PROMPT) - 1 : -1]
    for row, logits_V in zip(rows, logits_MV, strict=True):
        best = torch.log_softmax(logits_V, dim=-1).topk(4)
        assert row is not None
        given = np.array([value for _, value in row], dtype=np.float32)
        assert_close([given], [best.values.numpy()], TOLERANCE)


@pytest.mark.parametrize("sparse", [True, False])
def test_scores_of_named_tokens(base, sparse: bool):
    sampler, oracle = base
    rng = np.random.default_rng(5)
    ids = torch.full((len(PROMPT) - 1, 3), -1, dtype=torch.int64)
    ids[-2:] = torch.from_numpy(rng.integers(FIRST_PLAIN_TOKEN, VOCAB, (2, 3)))
    make = tinker.TensorData.from_torch
    target = tinker.TensorData.from_torch_sparse(ids, pad_value=-1) if sparse else make(ids)
    assert (target.sparse_crow_indices is not None) is sparse
    answer = sample(
        sampler, max_tokens=1, include_prompt_logprobs=True, target_prompt_logprobs=target
    )
    assert answer.target_prompt_logprobs is not None
    given = answer.target_prompt_logprobs.to_torch()
    logprobs_MV = torch.log_softmax(next_logits(oracle, PROMPT), dim=-1)[:-1]
    expected = torch.where(ids < 0, 0.0, logprobs_MV.gather(1, ids.clamp(min=0)))
    assert_close([given.numpy()], [expected.numpy()], TOLERANCE)


def test_only_the_end_of_a_prompt_can_be_scored(base):
    sampler, _ = base
    tokens = tinker.ModelInput.from_ints(PROMPT)
    every = sampler.compute_logprobs(tokens).result()
    last = sampler.compute_logprobs(tokens, prompt_logprobs_last_n=4).result()
    assert last[:-4] == [None] * (len(PROMPT) - 4)
    assert last[-4:] == pytest.approx(every[-4:], abs=TOLERANCE)


def test_both_names_of_the_base_are_one_model(service: tinker.ServiceClient, base):
    other = service.create_sampling_client(base_model=CHAT_ALIAS).result()
    assert_same_bits([prompt_scores(other, PROMPT)], [prompt_scores(base[0], PROMPT)])


def _score_elsewhere(frozen: bytes, tokens: list[int], answers: Any) -> None:
    sampler = pickle.loads(frozen)
    answers.put(sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result())


def test_a_sampling_client_can_be_sent_to_another_process(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1)
    sampler = client.save_weights_and_get_sampling_client().result()
    expected = [None, *prompt_scores(sampler, PROMPT).tolist()]
    handle = tinker.SamplingClient.from_sampler_handle(
        sampler.get_sampler_handle(), api_key="tml-test"
    )
    assert [None, *prompt_scores(handle, PROMPT).tolist()] == expected
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(
        target=_score_elsewhere, args=(pickle.dumps(sampler), PROMPT, answers)
    )
    process.start()
    assert answers.get(timeout=60) == expected
    process.join()
    # The original goes on counting from where it was.
    assert [None, *prompt_scores(sampler, PROMPT).tolist()] == expected
