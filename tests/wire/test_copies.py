"""Copies of checkpoints, and archives of them."""

import io
import secrets
import tarfile
from pathlib import Path

import httpx
import pytest
import tinker
from safetensors.numpy import load

from tests.wire.data import forward
from tests.wire.server import DEVELOPER, Server, create_key
from tests.wire.test_checkpoints import PROBE, assert_same_bits, create, rest, train
from tests.wire.weights import WEIGHTS_FILE, download

__all__ = ["rest"]
PROJECT = "proj-archive"


def ask(server: Server, key: str = DEVELOPER) -> httpx.Client:
    """A client of the routes themselves."""
    return httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-API-Key": key}, trust_env=False, timeout=60
    )


def copy_by_hand(http: httpx.Client, path: str, key: str) -> httpx.Response:
    """One request for a copy, which may come again."""
    return http.post(
        "/copy_weights",
        json={"source_path": path, "destination_project_id": PROJECT},
        headers={"X-Idempotency-Key": key},
    )


def test_a_copy_is_a_training_run_of_its_own(
    service: tinker.ServiceClient, rest: tinker.RestClient
):
    client = create(service)
    train(client, 1, 2)
    path = client.save_state("kept").result().path
    expected = forward(client, PROBE)
    copy = rest.copy_weights(path, PROJECT, ttl_seconds=7200).result()
    run, kind, name = copy.removeprefix("tinker://").split("/")
    assert run != client.model_id
    assert (kind, name) == ("weights", "kept")
    (listed,) = rest.list_checkpoints(run).result().checkpoints
    assert listed.tinker_path == copy
    assert listed.expires_at is not None
    rest.delete_checkpoint_from_tinker_path(path).result()  # the copy stays
    resumed = service.create_training_client_from_state_with_optimizer(copy).result()
    assert_same_bits(forward(resumed, PROBE), expected)


def test_a_sampler_may_be_copied_and_a_copy_is_not_trained(
    service: tinker.ServiceClient, server: Server, rest: tinker.RestClient
):
    client = create(service)
    train(client, 1)
    path = client.save_weights_for_sampler("s").result().path
    copy = rest.copy_weights(path, PROJECT).result()
    assert "/sampler_weights/s" in copy
    prompt = tinker.ModelInput.from_ints(PROBE[0].tokens.tolist())
    one, two = (
        service.create_sampling_client(model_path=p).result().compute_logprobs(prompt).result()
        for p in (path, copy)
    )
    assert one == two
    with ask(server) as http:
        body = {"model_id": copy.split("/")[2], "seq_id": 1, "adam_params": {"learning_rate": 1.0}}
        answer = http.post("/optim_step", json=body)
    assert answer.status_code == 410


def test_a_request_that_comes_again_makes_one_copy(service: tinker.ServiceClient, server: Server):
    client = create(service)
    path = client.save_state("one").result().path
    key = secrets.token_hex(8)
    with ask(server) as http:
        first, again = (copy_by_hand(http, path, key).json() for _ in range(2))
        assert first == again
        other = copy_by_hand(http, path, secrets.token_hex(8)).json()
        assert other != first
        conflict = copy_by_hand(http, client.save_state("two").result().path, key)
        assert conflict.status_code == 400
        for bad in ({}, {"session_id": "s"}, {"model_seq_id": 1, "destination_project_id": "p"}):
            assert http.post("/copy_weights", json={"source_path": path, **bad}).status_code == 422
        token = {"source_path": path, "destination_project_id": "p", "weights_access_token": "t"}
        assert http.post("/copy_weights", json=token).status_code == 400


def test_a_copy_may_take_a_slot_of_a_session(service: tinker.ServiceClient, server: Server):
    client = create(service)
    path = client.save_state("one").result().path
    session = client.model_id.partition(":")[0]
    body = {"source_path": path, "session_id": session, "model_seq_id": 77}
    with ask(server) as http:
        copy = http.post("/copy_weights", json=body).json()["tinker_path"]
        assert copy == f"tinker://{session}:train:77/weights/one"
        assert http.post("/copy_weights", json=body).json()["tinker_path"] == copy
        body["session_id"] = "s-nobodys"
        assert http.post("/copy_weights", json=body).status_code == 404


def test_others_copy_and_fetch_only_what_was_published(serve, connect, tmp_path: Path):
    ann, bob = (create_key(tmp_path / "data", tenant) for tenant in ("ann", "bob"))
    server: Server = serve()
    client = create(connect(server, ann))
    train(client, 1)
    path = client.save_state("mine").result().path
    place = f"/training_runs/{client.model_id}/checkpoints/weights/mine"
    with ask(server, bob) as http:
        assert copy_by_hand(http, path, "k").status_code == 404
        assert http.get(f"{place}/archive").status_code == 404
        with ask(server, ann) as owner:
            assert owner.post(f"{place}/publish").status_code == 200
        copy = copy_by_hand(http, path, "k").json()["tinker_path"]
        with ask(server, ann) as owner:
            assert owner.delete(place).status_code == 200
        server.restart()
        run = copy.removeprefix("tinker://").partition("/")[0]
        listed = http.get(f"/training_runs/{run}/checkpoints").json()["checkpoints"]
        assert [one["tinker_path"] for one in listed] == [copy]
        assert http.get(f"/training_runs/{run}/checkpoints/weights/mine/archive").is_redirect
    resumed = connect(server, bob).create_training_client_from_state(copy).result()
    assert resumed.model_id != run


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_an_archive_holds_pefts_files(service: tinker.ServiceClient, server: Server, kind: str):
    client = create(service)
    train(client, 1, 2)
    path = client.save_weights_external("out").result().path
    expected = download(server, path)
    match kind:
        case "weights":
            path = client.save_state("out").result().path
        case "sampler_weights":
            path = client.save_weights_for_sampler("out").result().path
    with ask(server) as http:
        sent = http.get(f"/training_runs/{client.model_id}/checkpoints/{kind}/out/archive")
    content = httpx.get(sent.headers["location"], trust_env=False, timeout=60).content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        found = {name: file.read() for name, file in files.items() if file is not None}
    assert found.keys() == expected.keys()
    mine, theirs = (load(those[WEIGHTS_FILE]) for those in (found, expected))
    assert mine.keys() == theirs.keys()
    assert all((mine[name] == theirs[name]).all() for name in theirs)
    assert not list(server.folder.glob(".archive-*"))
