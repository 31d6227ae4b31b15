"""What is refused, and how: the kind of the error decides whether the SDK tries again."""

from typing import Any

import numpy as np
import pytest
import tinker

from manylora.types import AdamParams
from tests.wire.data import (
    VOCAB,
    assert_same_bits,
    forward,
    random_data,
    sdk_adam,
    sdk_datum,
    to_sdk,
)
from tests.wire.server import BASE_ALIAS, Server

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 2)
USER = tinker.types.RequestErrorCategory.User


@pytest.fixture
def client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(BASE_ALIAS, rank=4, seed=1).result()


def refused(client: tinker.TrainingClient, data: Any, loss: Any, config: Any = None) -> str:
    """The message of a forward_backward that fails at the user's fault."""
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError)) as caught:
        client.forward_backward(data, loss, config).result()
    if isinstance(caught.value, tinker.RequestFailedError):
        assert caught.value.category == USER
    return str(caught.value)


def bad_data() -> dict[str, tuple[Any, str, Any, str]]:
    good = random_data(1, 2)
    policy = random_data(2, 2, "ppo")
    tokens = good[0].tokens
    weights = np.ones(len(tokens), dtype=np.float32)
    targets = good[0].loss_inputs["target_tokens"]
    return {
        "unknown loss": (to_sdk(good), "no_such_loss", None, "no_such_loss"),
        "refused loss": (to_sdk(policy), "stable_reinforce", None, "stable_reinforce"),
        "loss by id": (to_sdk(good), "custom", {"loss_id": "x"}, "custom"),
        "missing input": (to_sdk(good), "ppo", None, "logprobs"),
        "left-over input": (
            [sdk_datum(tokens, {"target_tokens": targets, "weights": weights, "mask": weights})],
            "cross_entropy",
            None,
            "mask",
        ),
        "no targets": ([sdk_datum(tokens, {"weights": weights})], "cross_entropy", None, "target"),
        "missing setting": (to_sdk(policy), "dro", None, "beta"),
        "unknown setting": (to_sdk(policy), "ppo", {"clip": 1.0}, "clip"),
        "wrong length": (
            [sdk_datum(tokens, {"target_tokens": targets[:-1], "weights": weights[:-1]})],
            "cross_entropy",
            None,
            str(len(tokens)),
        ),
        "no such token": (
            [sdk_datum(tokens, {"target_tokens": targets + VOCAB, "weights": weights})],
            "cross_entropy",
            None,
            str(VOCAB - 1),
        ),
        "too long": (
            [
                sdk_datum(
                    np.full(1500, 9), {"target_tokens": np.full(1500, 9), "weights": np.ones(1500)}
                )
            ],
            "cross_entropy",
            None,
            "1024",
        ),
    }


@pytest.mark.parametrize("estimator", [None, 3.0])
def test_the_protocol_has_no_reference_policy(
    client: tinker.TrainingClient, estimator: float | None
):
    """The engine knows its inputs and its setting; here they are refused as ever."""
    (datum,) = random_data(2, 1, "ppo")
    if estimator is not None:
        words = refused(client, to_sdk([datum]), "ppo", {"kl_estimator": estimator})
        assert "has no setting 'kl_estimator'; it takes: clip_high_threshold, clip_low_thr" in words
        return
    ones = np.ones(len(datum.tokens), dtype=np.float32)
    inputs = {**datum.loss_inputs, "reference_logprobs": ones, "kl_weights": ones}
    words = refused(client, [sdk_datum(datum.tokens, inputs)], "ppo", None)
    assert "has no input 'kl_weights'; it takes: target_tokens, logprobs, advantages" in words


@pytest.mark.parametrize("case", bad_data())
def test_bad_data_name_what_is_wrong(client: tinker.TrainingClient, case: str):
    data, loss, config, named = bad_data()[case]
    assert named in refused(client, data, loss, config)


def test_a_failure_takes_the_step_behind_it_along_and_nothing_else(client: tinker.TrainingClient):
    client.forward_backward(to_sdk(random_data(1, 2)), "cross_entropy").result()
    client.optim_step(sdk_adam(STEP)).result()
    before = forward(client, PROBE)
    good = client.forward_backward(to_sdk(random_data(2, 2)), "cross_entropy")
    poison = random_data(3, 2)
    poison[1].loss_inputs["weights"][0] = np.nan
    bad = client.forward_backward(to_sdk(poison), "cross_entropy")
    step = client.optim_step(sdk_adam(STEP))
    after = client.forward(to_sdk(PROBE), "cross_entropy")
    good.result()
    with pytest.raises(tinker.TinkerError):
        bad.result()
    with pytest.raises(tinker.TinkerError):
        step.result()
    # No part of that step was applied: not the good half of its gradient either.
    assert_same_bits([o["logprobs"].to_numpy() for o in after.result().loss_fn_outputs], before)
    client.forward_backward(to_sdk(random_data(4, 2)), "cross_entropy").result()
    client.optim_step(sdk_adam(STEP)).result()
    assert client.forward(to_sdk(PROBE), "cross_entropy").result().metrics["loss:sum"]


def test_what_came_after_a_failure_is_what_would_have_come_without_it(
    service: tinker.ServiceClient,
):
    clients = [
        service.create_lora_training_client(BASE_ALIAS, rank=4, seed=1).result() for _ in range(2)
    ]
    spoiled = clients[1].forward_backward(to_sdk(random_data(3, 2)), "no_such_loss")  # type: ignore[arg-type]
    dropped = clients[1].optim_step(sdk_adam(STEP))
    for future in (spoiled, dropped):
        with pytest.raises(tinker.TinkerError):
            future.result()
    for client in clients:
        client.forward_backward(to_sdk(random_data(4, 2)), "cross_entropy").result()
        client.optim_step(sdk_adam(STEP)).result()
    assert_same_bits(forward(clients[0], PROBE), forward(clients[1], PROBE))


def test_an_unknown_base_is_named_with_those_there_are(service: tinker.ServiceClient):
    with pytest.raises(tinker.TinkerError, match=BASE_ALIAS):
        service.create_lora_training_client("Qwen/Qwen3-32B").result()
    with pytest.raises(tinker.TinkerError, match=BASE_ALIAS):
        service.create_sampling_client(base_model="Qwen/Qwen3-32B").result()


@pytest.mark.parametrize("rank", [0, -1, 100_000])
def test_an_impossible_rank_is_refused(service: tinker.ServiceClient, rank: int):
    with pytest.raises(tinker.TinkerError, match="rank"):
        service.create_lora_training_client(BASE_ALIAS, rank=rank).result()


def test_another_optimizer_is_refused_by_name(service: tinker.ServiceClient):
    config = tinker.types.DimuonOptimizerConfig()
    with pytest.raises(tinker.TinkerError, match="dimuon"):
        service.create_lora_training_client(BASE_ALIAS, optimizer=config).result()


@pytest.mark.parametrize(
    "path",
    [
        "tinker://no-such-run:train:0/weights/x",
        "tinker://a/b",
        "tinker://../../etc/weights/passwd",
        "tinker://run/weights/..",
    ],
)
def test_a_missing_checkpoint_is_an_error(service: tinker.ServiceClient, path: str):
    with pytest.raises(tinker.TinkerError):
        service.create_training_client_from_state(path).result()
    with pytest.raises(tinker.TinkerError):
        service.create_sampling_client(model_path=path).result()


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 5000, "a\x00b", "a\nb"])
def test_a_name_that_is_no_file_name_is_refused(client: tinker.TrainingClient, name: str):
    with pytest.raises(tinker.TinkerError):
        client.save_state(name).result()
    client.save_state("a-good.name_1").result()  # the refused one has used up its number


def test_a_lifetime_out_of_bounds_is_refused(client: tinker.TrainingClient):
    with pytest.raises(tinker.TinkerError, match="3600"):
        client.save_state("short", ttl_seconds=60).result()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_impossible_sampling_settings_are_named(
    service: tinker.ServiceClient, settings: dict[str, Any], named: str
):
    sampler = service.create_sampling_client(base_model=BASE_ALIAS).result()
    params = tinker.SamplingParams.model_validate({"max_tokens": 4, **settings})
    with pytest.raises(tinker.TinkerError, match=named):
        sampler.sample(tinker.ModelInput.from_ints([9, 10, 11]), 1, params).result()


@pytest.mark.parametrize("tokens", [[], [VOCAB], [-1], [9] * 1024, [9] * 5000])
def test_impossible_prompts_are_refused(service: tinker.ServiceClient, tokens: list[int]):
    sampler = service.create_sampling_client(base_model=BASE_ALIAS).result()
    with pytest.raises(tinker.TinkerError):
        sampler.sample(
            tinker.ModelInput.from_ints(tokens), 1, tinker.SamplingParams(max_tokens=4)
        ).result()


def test_an_answer_that_reaches_the_context_ends_there(service: tinker.ServiceClient):
    sampler = service.create_sampling_client(base_model=BASE_ALIAS).result()
    (sequence,) = (
        sampler.sample(
            tinker.ModelInput.from_ints([9] * 1020),
            1,
            tinker.SamplingParams(max_tokens=50, stop=[], seed=1),
        )
        .result()
        .sequences
    )
    assert 1 <= len(sequence.tokens) <= 5
    assert sequence.stop_reason == "length"


def test_a_key_of_another_kind_never_leaves_the_client(server: Server):
    with pytest.raises(Exception, match="tml-"):
        tinker.ServiceClient(base_url=server.url, api_key="sk-123").create_sampling_client(
            base_model=BASE_ALIAS
        ).result()
