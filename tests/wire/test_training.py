"""What the SDK trains is what the reference engine trains: losses, gradients, optimizer steps.

N tokens of a datum, K candidates of a place.
"""

from typing import Any

import numpy as np
import pytest
import tinker
import torch

from manylora.types import AdamParams
from tests.wire.data import (
    FIRST_PLAIN_TOKEN,
    LINEAR,
    VOCAB,
    assert_close,
    assert_same_bits,
    differ,
    forward,
    outputs,
    random_data,
    sampled_near,
    sdk_adam,
    sdk_datum,
    to_sdk,
)
from tests.wire.oracle import Oracle, candidates_as_data
from tests.wire.server import BASE_ALIAS, CHAT_ALIAS, Server
from tests.wire.weights import assert_factors_close, exported_factors

LOSSES: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {},
    "cispo": {},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
}
STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0)
PROBE = random_data(99, 4)
SUM = "loss:sum"


def create(
    service: tinker.ServiceClient, rank: int = 4, seed: int = 1, **options: Any
) -> tinker.TrainingClient:
    return service.create_lora_training_client(BASE_ALIAS, rank=rank, seed=seed, **options).result()


def move_away(client: tinker.TrainingClient, oracle: Oracle | None = None) -> None:
    """Two steps, so that B is no longer zero and every gradient flows."""
    for seed in (11, 12):
        data = random_data(seed, 6)
        client.forward_backward(to_sdk(data), "cross_entropy").result()
        client.optim_step(sdk_adam(LINEAR)).result()
        if oracle is not None:
            oracle.forward_backward(data)
            oracle.step(LINEAR)


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("alias", [BASE_ALIAS, CHAT_ALIAS])
def test_a_new_adapter_says_what_it_is(service: tinker.ServiceClient, rank: int, alias: str):
    client = service.create_lora_training_client(alias, rank=rank).result()
    info = client.get_info()
    assert info.model_id == client.model_id
    assert info.model_data.model_name == alias
    assert info.is_lora is True
    assert info.lora_rank == rank


def test_a_new_adapter_changes_nothing_about_the_base(service: tinker.ServiceClient):
    assert_close(forward(create(service), PROBE), Oracle(4, 1).logprobs(PROBE))


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_and_its_gradient(service: tinker.ServiceClient, server: Server, loss: Any):
    client, oracle = create(service), Oracle(4, 1)
    move_away(client, oracle)
    data, config = random_data(5, 8, loss), LOSSES[loss]
    if loss != "cross_entropy":
        data = sampled_near(data, oracle.logprobs(data), seed=6)
    result = client.forward_backward(to_sdk(data), loss, config or None).result()
    expected, total = oracle.forward_backward(data, loss, config)
    assert_close(outputs(result), expected)
    assert result.metrics[SUM] == pytest.approx(total, rel=1e-5, abs=1e-4)
    client.optim_step(sdk_adam(LINEAR)).result()
    oracle.step(LINEAR)
    factors = exported_factors(server, client, f"after-{loss}")
    assert_factors_close(factors, oracle.factors(), 1e-5)
    assert differ(forward(client, PROBE), Oracle(4, 1).logprobs(PROBE))


@pytest.mark.parametrize("sparse", [True, False])
def test_several_candidates_at_a_place(service: tinker.ServiceClient, server: Server, sparse: bool):
    client, oracle = create(service), Oracle(4, 1)
    move_away(client, oracle)
    rng = np.random.default_rng(3)
    tokens = rng.integers(FIRST_PLAIN_TOKEN, VOCAB, 12)
    targets_NK = rng.integers(FIRST_PLAIN_TOKEN, VOCAB, (12, 5))
    weights_NK = rng.normal(size=(12, 5)).astype(np.float32)
    weights_NK[:9] = 0.0
    targets_NK[:9] = 0
    given: dict[str, Any] = {"target_tokens": targets_NK, "weights": weights_NK}
    if sparse:
        given = {name: torch.from_numpy(value) for name, value in given.items()}
    datum = sdk_datum(tokens, given)
    assert (datum.loss_fn_inputs["weights"].sparse_crow_indices is not None) is sparse
    result = client.forward_backward([datum], "cross_entropy").result()
    columns = candidates_as_data(tokens, targets_NK, weights_NK)
    expected, total = oracle.forward_backward(columns)
    assert_close(outputs(result), [np.stack(expected, axis=1)])
    assert result.metrics[SUM] == pytest.approx(total, rel=1e-5, abs=1e-4)
    client.optim_step(sdk_adam(LINEAR)).result()
    oracle.step(LINEAR)
    factors = exported_factors(server, client, f"candidates-{sparse}")
    assert_factors_close(factors, oracle.factors(), 1e-5)


def test_a_chunked_batch_is_one_request(service: tinker.ServiceClient, server: Server):
    """2 100 data go out in three requests, the first of them last."""
    few, repeat = random_data(21, 21, lengths=(2, 8)), 100
    data = to_sdk(few * repeat)
    whole, chunked, oracle = create(service), create(service), Oracle(4, 1)
    holder, config = service.holder, service.holder._client_config
    assert config.fwdbwd_max_chunk_len < len(data) / 2
    holder._client_config = config.model_copy(update={"fwdbwd_max_chunk_len": len(data)})
    one = whole.forward_backward(data, "cross_entropy").result()
    holder._client_config = config
    three = chunked.forward_backward(data, "cross_entropy").result()
    expected, total = oracle.forward_backward(few, repeat=repeat)
    for result in (one, three):
        assert_close(outputs(result), expected * repeat)
        assert result.metrics[SUM] == pytest.approx(total, rel=1e-5)
    oracle.step(LINEAR)
    for client, name in ((whole, "whole"), (chunked, "chunked")):
        client.optim_step(sdk_adam(LINEAR)).result()
        # 2 100 gradients are added up in another order on each side
        assert_factors_close(exported_factors(server, client, name), oracle.factors(), 1e-4)


def test_pipelined_pairs_are_the_same_as_pairs_one_by_one(service: tinker.ServiceClient):
    batches = [random_data(100 + number, 3) for number in range(20)]
    pipelined, waiting, oracle = create(service, seed=5), create(service, seed=5), Oracle(4, 5)
    futures = [
        (
            pipelined.forward_backward(to_sdk(batch), "cross_entropy"),
            pipelined.optim_step(sdk_adam(STEP)),
        )
        for batch in batches
    ]
    for (result, step), batch in zip(futures, batches, strict=True):
        alone = waiting.forward_backward(to_sdk(batch), "cross_entropy").result()
        waiting.optim_step(sdk_adam(STEP)).result()
        assert_same_bits(outputs(result.result()), outputs(alone))
        step.result()
        expected, _ = oracle.forward_backward(batch)
        oracle.step(STEP)
        assert_close(outputs(alone), expected, 1e-3)  # rounding grows from step to step
    assert_same_bits(forward(pipelined, PROBE), forward(waiting, PROBE))
    assert differ(forward(pipelined, PROBE), Oracle(4, 5).logprobs(PROBE), by=0.05)


def test_adamw_with_settings_that_change_from_step_to_step(
    service: tinker.ServiceClient, server: Server
):
    client, oracle = create(service, rank=16, seed=2), Oracle(16, 2)
    steps = [
        AdamParams(lr=1e-3, beta2=0.95, eps=1e-8),
        AdamParams(lr=5e-4, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=30.0),
        AdamParams(lr=2e-3, beta2=0.999, eps=1e-8, clip_norm=0.5),
        AdamParams(lr=1e-3, beta1=0.0, beta2=0.9, eps=1e-4, weight_decay=0.01, clip_norm=1e6),
        AdamParams(lr=0.0, eps=1e-8),
        AdamParams(lr=1e-3, beta2=0.95, eps=1e-8, clip_norm=2.0),
    ]
    for number, params in enumerate(steps):
        data = random_data(200 + number, 4)
        client.forward_backward(to_sdk(data), "cross_entropy").result()
        client.optim_step(sdk_adam(params)).result()
        oracle.forward_backward(data)
        oracle.step(params)
    given, expected = exported_factors(server, client, "adamw"), oracle.factors()
    assert given.keys() == expected.keys()
    for layer, matrices in expected.items():
        for one, other in zip(given[layer], matrices, strict=True):
            assert np.abs(one - other).max() <= 1e-4, layer
    assert_close(forward(client, PROBE), oracle.logprobs(PROBE), 1e-3)


def test_the_defaults_of_the_sdks_adam(service: tinker.ServiceClient):
    """beta2 0.95, eps 1e-12: not torch's."""
    client, oracle = create(service), Oracle(4, 1)
    for seed in (31, 32, 33):
        data = random_data(seed, 4)
        client.forward_backward(to_sdk(data), "cross_entropy").result()
        client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        oracle.forward_backward(data)
        oracle.step(AdamParams(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-12))
    assert_close(forward(client, PROBE), oracle.logprobs(PROBE), 1e-3)


def test_what_a_step_measures(service: tinker.ServiceClient):
    """Its names are none that recipes give to columns of their own, which they would overwrite."""
    client, oracle = create(service), Oracle(4, 1)
    for number in (1, 2):
        data = random_data(number, 3)
        client.forward_backward(to_sdk(data), "cross_entropy").result()
        oracle.forward_backward(data)
        metrics = client.optim_step(sdk_adam(LINEAR)).result().metrics
        assert metrics is not None
        assert metrics["grad_norm"] == pytest.approx(oracle.step(LINEAR), rel=1e-4)
        assert metrics["optim/step"] == number
        assert metrics.keys().isdisjoint({"step", "epoch", "progress", "batch"})


def test_gradients_add_up_until_the_step(service: tinker.ServiceClient, server: Server):
    parts, together, oracle = create(service), create(service), Oracle(4, 1)
    first, second = random_data(41, 3), random_data(42, 5)
    for data in (first, second):
        parts.forward_backward(to_sdk(data), "cross_entropy").result()
    together.forward_backward(to_sdk(first + second), "cross_entropy").result()
    oracle.forward_backward(first + second)
    oracle.step(LINEAR)
    for client, name in ((parts, "parts"), (together, "together")):
        client.optim_step(sdk_adam(LINEAR)).result()
        assert_factors_close(exported_factors(server, client, name), oracle.factors(), 1e-5)


def test_a_forward_leaves_gradients_alone(service: tinker.ServiceClient):
    data, other = random_data(51, 4), random_data(52, 4)
    plain, peeking = create(service), create(service)
    for client in (plain, peeking):
        client.forward_backward(to_sdk(data), "cross_entropy").result()
    seen = forward(peeking, other)
    assert_close(seen, Oracle(4, 1).logprobs(other))
    for client in (plain, peeking):
        client.optim_step(sdk_adam(STEP)).result()
    assert_same_bits(forward(plain, PROBE), forward(peeking, PROBE))
    assert differ(forward(plain, PROBE), Oracle(4, 1).logprobs(PROBE))


def test_a_step_without_gradients_changes_nothing(service: tinker.ServiceClient):
    client = create(service)
    before = forward(client, PROBE)
    client.optim_step(tinker.AdamParams(learning_rate=0.1)).result()
    assert_same_bits(forward(client, PROBE), before)


def test_a_loss_of_the_clients_own(service: tinker.ServiceClient, server: Server):
    """Its derivative by the log-probabilities goes back as weights, some of them negative."""
    client, oracle = create(service), Oracle(4, 1)
    move_away(client, oracle)
    data = random_data(61, 6)

    def margin(
        _: list[tinker.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        sums = [logprobs_N.sum() for logprobs_N in logprobs]
        pairs = [a - b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        loss = -torch.nn.functional.logsigmoid(0.05 * torch.stack(pairs)).sum()
        return loss, {"pairs:sum": float(len(pairs))}

    custom = client.forward_backward_custom(to_sdk(data), margin)
    step = client.optim_step(sdk_adam(LINEAR))  # submitted while its gradient is unknown
    result = custom.result()
    step.result()
    expected = [oracle.reference.logprobs(datum) for datum in data]
    loss, _ = margin([], expected)
    loss.backward()
    oracle.step(LINEAR)
    assert_close(outputs(result), [logprobs.detach().numpy() for logprobs in expected])
    assert result.metrics[SUM] == pytest.approx(loss.item(), rel=1e-4)
    assert result.metrics["pairs:sum"] == 3.0
    assert_factors_close(exported_factors(server, client, "custom"), oracle.factors(), 1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        {"train_unembed": False},
        {"train_mlp": False, "train_unembed": False},
        {"train_attn": False, "train_mlp": False},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_what_is_trained_can_be_chosen(
    service: tinker.ServiceClient, server: Server, flags: dict[str, bool]
):
    client = create(service, rank=3, seed=8, **flags)
    oracle = Oracle(
        3,
        8,
        attention=flags.get("train_attn", True),
        mlp=flags.get("train_mlp", True),
        unembed=flags.get("train_unembed", True),
    )
    move_away(client, oracle)
    assert_close(forward(client, PROBE), oracle.logprobs(PROBE), 1e-4)
    factors = exported_factors(server, client, "chosen")
    assert factors.keys() == oracle.factors().keys()
