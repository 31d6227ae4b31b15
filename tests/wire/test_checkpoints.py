"""Saving, loading and looking after checkpoints through the SDK."""

import datetime
from pathlib import Path

import pytest
import tinker

from manylora.types import AdamParams
from tests.wire.data import (
    assert_close,
    assert_same_bits,
    differ,
    forward,
    outputs,
    random_data,
    scores,
    sdk_adam,
    to_sdk,
)
from tests.wire.server import BASE_ALIAS, DEVELOPER, Server
from tests.wire.weights import download, exported_factors, save_folder

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 3)
YEAR = 365 * 24 * 3600


def create(service: tinker.ServiceClient, rank: int = 4, seed: int = 1) -> tinker.TrainingClient:
    return service.create_lora_training_client(BASE_ALIAS, rank=rank, seed=seed).result()


def train(client: tinker.TrainingClient, *seeds: int) -> None:
    """One pair for each seed."""
    for seed in seeds:
        client.forward_backward(to_sdk(random_data(seed, 3)), "cross_entropy").result()
        client.optim_step(sdk_adam(STEP)).result()


@pytest.fixture
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=DEVELOPER)


def test_training_goes_on_from_a_state_with_its_optimizer(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1, 2, 3)
    path = client.save_state("three").result().path
    assert path == f"tinker://{client.model_id}/weights/three"
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.model_id != client.model_id
    assert resumed.get_info().lora_rank == 4
    assert_same_bits(forward(resumed, PROBE), forward(client, PROBE))
    for one in (client, resumed):
        train(one, 4, 5)
    assert_same_bits(forward(resumed, PROBE), forward(client, PROBE))


def test_without_its_optimizer_the_moments_are_fresh(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1, 2, 3)
    path = client.save_state("three").result().path
    fresh = [service.create_training_client_from_state(path).result() for _ in range(2)]
    assert_same_bits(forward(fresh[0], PROBE), forward(client, PROBE))
    for one in (client, *fresh):
        train(one, 4)
    assert_same_bits(forward(fresh[0], PROBE), forward(fresh[1], PROBE))
    assert differ(forward(fresh[0], PROBE), forward(client, PROBE))


@pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning")
def test_a_new_client_can_still_load_the_old_way(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1, 2, 3)
    path = client.save_state("three").result().path
    whole, weights = create(service, seed=8), create(service, seed=8)
    whole.load_state_with_optimizer(path).result()
    weights.load_state(path).result()
    for one in (whole, weights):
        assert_same_bits(forward(one, PROBE), forward(client, PROBE))
    for one in (client, whole, weights):
        train(one, 4)
    assert_same_bits(forward(whole, PROBE), forward(client, PROBE))
    assert differ(forward(weights, PROBE), forward(client, PROBE))
    with pytest.raises(tinker.TinkerError, match="create a training client"):
        client.load_state(path).result()


def test_a_save_takes_the_weights_of_its_place_in_the_order(service: tinker.ServiceClient):
    """Submitted between two steps that are submitted before anything is read."""
    client, plain = create(service), create(service)
    train(plain, 1)
    futures = [client.forward_backward(to_sdk(random_data(1, 3)), "cross_entropy")]
    step = client.optim_step(sdk_adam(STEP))
    saved = client.save_state("middle")
    sampler = client.save_weights_for_sampler("middle")
    futures.append(client.forward_backward(to_sdk(random_data(2, 3)), "cross_entropy"))
    last = client.optim_step(sdk_adam(STEP))
    for future in (*futures, step, last):
        future.result()
    loaded = service.create_training_client_from_state(saved.result().path).result()
    assert_same_bits(forward(loaded, PROBE), forward(plain, PROBE))
    assert differ(forward(loaded, PROBE), forward(client, PROBE))
    assert sampler.result().path == f"tinker://{client.model_id}/sampler_weights/middle"


def test_a_gradient_that_was_pending_is_not_saved(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1)
    client.forward_backward(to_sdk(random_data(2, 3)), "cross_entropy").result()
    path = client.save_state("pending").result().path
    loaded = service.create_training_client_from_state_with_optimizer(path).result()
    plain = create(service)
    train(plain, 1, 3)
    train(loaded, 3)
    assert_same_bits(forward(loaded, PROBE), forward(plain, PROBE))


def test_a_named_sampler_serves_what_was_saved(service: tinker.ServiceClient):
    client = create(service)
    train(client, 1, 2)
    path = client.save_weights_for_sampler("two").result().path
    expected = forward(client, PROBE)
    train(client, 3)
    sampler = service.create_sampling_client(model_path=path).result()
    assert sampler.get_base_model() == BASE_ALIAS
    both = service.create_sampling_client(model_path=path, base_model=BASE_ALIAS).result()
    for one in (sampler, both):
        assert_close([scores(one, datum) for datum in PROBE], expected, 1e-4)


def test_a_sampler_checkpoint_cannot_be_trained_and_a_state_not_sampled(
    service: tinker.ServiceClient,
):
    client = create(service)
    state = client.save_state("one").result().path
    sampler = client.save_weights_for_sampler("one").result().path
    with pytest.raises(tinker.TinkerError):
        service.create_training_client_from_state(sampler).result()
    with pytest.raises(tinker.TinkerError):
        service.create_sampling_client(model_path=state).result()


def test_names_are_kept_unless_overwritten(service: tinker.ServiceClient, rest: tinker.RestClient):
    client = create(service)
    train(client, 1)
    path = client.save_state("same", user_metadata={"step": "1"}).result().path
    first = forward(client, PROBE)
    train(client, 2)
    with pytest.raises(tinker.TinkerError, match="same"):
        client.save_state("same").result()
    # The refused save has used up its number; the client goes on.
    assert_same_bits(
        forward(service.create_training_client_from_state(path).result(), PROBE), first
    )
    again = client.save_state("same", overwrite=True, user_metadata={"step": "2"}).result().path
    assert again == path
    second = forward(service.create_training_client_from_state(path).result(), PROBE)
    assert_same_bits(second, forward(client, PROBE))
    (checkpoint,) = rest.list_checkpoints(client.model_id).result().checkpoints
    assert checkpoint.user_metadata == {"step": "2"}


def test_checkpoints_are_listed_with_all_that_is_known(
    service: tinker.ServiceClient, rest: tinker.RestClient
):
    client = service.create_lora_training_client(
        BASE_ALIAS, rank=6, user_metadata={"renderer_name": "role_colon"}
    ).result()
    train(client, 1)
    state = client.save_state("s", ttl_seconds=7200, user_metadata={"note": "x"}).result().path
    sampler = client.save_weights_for_sampler("s").result().path
    found = {
        one.tinker_path: one for one in rest.list_checkpoints(client.model_id).result().checkpoints
    }
    assert found.keys() == {state, sampler}
    assert found[state].checkpoint_type == "training"
    assert found[state].checkpoint_id == "weights/s"
    assert found[state].user_metadata == {"note": "x"}
    assert found[state].public is False
    assert (found[state].size_bytes or 0) > (found[sampler].size_bytes or 0) > 0
    assert found[sampler].checkpoint_type == "sampler"
    assert found[sampler].expires_at is None
    expiry = found[state].expires_at
    assert expiry is not None
    left = expiry - datetime.datetime.now(datetime.UTC)
    assert 7000 < left.total_seconds() <= 7200
    everything = rest.list_user_checkpoints(limit=2).result()
    assert {one.tinker_path for one in everything.checkpoints} == {state, sampler}  # newest first
    assert everything.cursor is not None
    assert everything.cursor.total_count >= 2
    run = rest.get_training_run_by_tinker_path(state).result()
    assert run.training_run_id == client.model_id
    assert run.base_model == BASE_ALIAS
    assert run.lora_rank == 6
    assert run.user_metadata == {"renderer_name": "role_colon"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == state
    runs = rest.list_training_runs(limit=1).result().training_runs
    assert [one.training_run_id for one in runs] == [client.model_id]
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (BASE_ALIAS, True, 6)
    assert info.train_unembed is True


def test_a_checkpoints_life_can_be_set_published_and_ended(
    service: tinker.ServiceClient, rest: tinker.RestClient
):
    client = create(service)
    train(client, 1)
    path = client.save_state("mortal").result().path

    def look() -> tinker.types.Checkpoint:
        (one,) = rest.list_checkpoints(client.model_id).result().checkpoints
        return one

    assert look().expires_at is None
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert look().expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert look().expires_at is None
    for seconds in (3599, 11 * YEAR):
        with pytest.raises(tinker.APIStatusError, match="ttl_seconds") as caught:
            rest.set_checkpoint_ttl_from_tinker_path(path, seconds).result()
        assert caught.value.status_code in (400, 422)
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert look().public is True
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert look().public is False
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(client.model_id).result().checkpoints == []
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.TinkerError):
        service.create_training_client_from_state(path).result()
    train(client, 2)  # the adapter itself goes on


def test_checkpoints_outlive_the_session_that_made_them(server: Server, connect):
    first = connect(server)
    client = create(first)
    train(client, 1, 2)
    path = client.save_state("kept").result().path
    expected = forward(client, PROBE)
    first.close("success").result()
    second = connect(server)
    resumed = second.create_training_client_from_state_with_optimizer(path).result()
    assert_same_bits(forward(resumed, PROBE), expected)


def test_checkpoints_outlive_the_server(serve, connect):
    server = serve()
    client = create(connect(server))
    train(client, 1, 2)
    state = client.save_state("kept").result().path
    sampler = client.save_weights_for_sampler("kept").result().path
    expected = forward(client, PROBE)
    server.restart()
    again = connect(server)
    resumed = again.create_training_client_from_state_with_optimizer(state).result()
    assert_same_bits(forward(resumed, PROBE), expected)
    one = again.create_sampling_client(model_path=sampler).result()
    assert_close([scores(one, datum) for datum in PROBE], expected, 1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_export_is_what_peft_computes_with(
    service: tinker.ServiceClient, server: Server, tmp_path: Path
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from manylora.models.base import resolve_base

    client = create(service)
    train(client, 1, 2, 3)
    path = client.save_weights_external("out").result().path
    assert path == f"tinker://{client.model_id}/external_weights/out"
    folder = save_folder(download(server, path), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(resolve_base("seedling"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    expected = []
    for datum in PROBE:
        with torch.no_grad():
            logits_NV = model(input_ids=torch.from_numpy(datum.tokens)[None]).logits[0]
        logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
        targets_N1 = torch.from_numpy(datum.loss_inputs["target_tokens"])[:, None]
        expected.append(logprobs_NV.gather(1, targets_N1)[:, 0].numpy())
    assert_close(forward(client, PROBE), expected, 1e-4)
    assert exported_factors(server, client, "again")


def test_the_gradient_of_a_loaded_adapter_is_the_same(service: tinker.ServiceClient):
    client = create(service, rank=16, seed=4)
    train(client, 1)
    path = client.save_state("g").result().path
    other = service.create_training_client_from_state_with_optimizer(path).result()
    data = to_sdk(random_data(8, 4))
    one, two = (c.forward_backward(data, "cross_entropy").result() for c in (client, other))
    assert_same_bits(outputs(one), outputs(two))
    assert one.metrics["loss:sum"] == two.metrics["loss:sum"]
