"""Another tenant's things are as if they were not there."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import tinker

from manylora.types import AdamParams
from tests.route_table import unasked, unknown
from tests.unit.service.client import application
from tests.unit.service.fake_hub import FakeHub
from tests.wire.data import (
    FIRST_PLAIN_TOKEN,
    assert_same_bits,
    forward,
    random_data,
    sdk_adam,
    to_sdk,
)
from tests.wire.plain import Plain, entry, lines
from tests.wire.raw import RawClient
from tests.wire.server import BASE_ALIAS, Server, create_key, run_keys

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 2)
PROMPT = tuple(range(FIRST_PLAIN_TOKEN, FIRST_PLAIN_TOKEN + 4))


@dataclass(frozen=True)
class Things:
    """What one tenant has, by its identifier."""

    session: str
    model: str
    future: str
    sampler: str
    state: str
    weights: str
    external: str
    run: str


MISSING = Things(
    session="00000000-0000-0000-0000-000000000000",
    model="00000000-0000-0000-0000-000000000000:train:0",
    future="00000000-0000-0000-0000-000000000000:train:0:1",
    sampler="00000000-0000-0000-0000-000000000000:sample:0",
    state="tinker://00000000-0000-0000-0000-000000000000:train:0/weights/x",
    weights="tinker://00000000-0000-0000-0000-000000000000:train:0/sampler_weights/x",
    external="tinker://00000000-0000-0000-0000-000000000000:train:0/external_weights/x",
    run="00000000-0000-0000-0000-000000000001",
)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """A server with two tenants, and a key of each."""
    folder = tmp_path_factory.mktemp("keyed")
    ann, bob = create_key(folder, "ann"), create_key(folder, "bob")
    with Server(folder) as server:
        yield server, ann, bob


@pytest.fixture
def things(keyed: tuple[Server, str, str], connect) -> Things:
    """What ann has, the futures read."""
    server, ann, _ = keyed
    service = connect(server, ann)
    client = service.create_lora_training_client(BASE_ALIAS, rank=4, seed=1).result()
    client.forward_backward(to_sdk(random_data(1, 2)), "cross_entropy").result()
    client.optim_step(sdk_adam(STEP)).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    raw = RawClient(server, ann)
    answer = raw.ok(raw.forward_backward(client.model_id, 4, PROBE, forward_only=True))
    raw.result(answer["request_id"])
    client._request_id_counter = client._turn_counter = 4
    return Things(
        session=service.holder.get_session_id(),
        model=client.model_id,
        future=answer["request_id"],
        sampler=sampler._sampling_session_id,
        state=client.save_state("x").result().path,
        weights=client.save_weights_for_sampler("x").result().path,
        external=client.save_weights_external("x").result().path,
        run=Plain(server, ann).submit(entry("hers", steps=2), lines()),
    )


def checkpoint_path(path: str) -> str:
    run, _, name = path.removeprefix("tinker://").partition("/")
    return f"training_runs/{run}/checkpoints/{name}"


Request = Callable[[RawClient, Things], httpx.Response]

ROUTES: dict[str, Request] = {
    "heartbeat": lambda c, t: c.post("session_heartbeat", session_id=t.session),
    "create_model": lambda c, t: c.post(
        "create_model", session_id=t.session, model_seq_id=7, base_model=BASE_ALIAS,
        lora_config={"rank": 4}, type="create_model",
    ),
    "create_sampling_session": lambda c, t: c.post(
        "create_sampling_session", session_id=t.session, sampling_session_seq_id=9,
        base_model=BASE_ALIAS,
    ),
    "load_weights": lambda c, t: c.post(
        "load_weights", session_id=t.session, model_seq_id=7, path=t.state, optimizer=True
    ),
    "load_weights into a model": lambda c, t: c.post(
        "load_weights", model_id=t.model, seq_id=8, path=t.state, optimizer=True
    ),
    "load_weights into one's own": lambda c, t: c.post(
        "load_weights", session_id=c.session_id, model_seq_id=7, path=t.state, optimizer=True
    ),
    "get_info": lambda c, t: c.post("get_info", model_id=t.model, type="get_info"),
    "forward_backward": lambda c, t: c.forward_backward(t.model, 8, PROBE),
    "optim_step": lambda c, t: c.optim_step(t.model, 8, STEP),
    "save_weights": lambda c, t: c.post(
        "save_weights", model_id=t.model, seq_id=8, path="y", overwrite=False, type="save_weights"
    ),
    "save_weights_for_sampler": lambda c, t: c.post(
        "save_weights_for_sampler", model_id=t.model, seq_id=8, path="y", kind="snapshot",
        type="save_weights_for_sampler",
    ),
    "save_weights_external": lambda c, t: c.post(
        "save_weights_external", model_id=t.model, seq_id=8, path="y"
    ),
    "asample": lambda c, t: c.sample(t.sampler, 8, PROMPT),
    "retrieve_future": lambda c, t: c.poll(t.future),
    "samplers": lambda c, t: c.http.get(f"/samplers/{t.sampler}"),
    "training_run": lambda c, t: c.http.get(f"/training_runs/{t.model}"),
    "checkpoints": lambda c, t: c.http.get(f"/training_runs/{t.model}/checkpoints"),
    "weights_info": lambda c, t: c.post("weights_info", tinker_path=t.state),
    "ttl": lambda c, t: c.http.put(f"/{checkpoint_path(t.state)}/ttl", json={"ttl_seconds": 3600}),
    "publish": lambda c, t: c.http.post(f"/{checkpoint_path(t.state)}/publish"),
    "unpublish": lambda c, t: c.http.delete(f"/{checkpoint_path(t.state)}/publish"),
    "archive": lambda c, t: c.http.get(f"/{checkpoint_path(t.weights)}/archive"),
    "copy_weights": lambda c, t: c.post(
        "copy_weights", source_path=t.state, destination_project_id="any"
    ),
    "external_urls": lambda c, t: c.http.get(
        f"/{checkpoint_path(t.external)}/external_weights_urls"
    ),
    "delete state": lambda c, t: c.http.delete(f"/{checkpoint_path(t.state)}"),
    "delete weights": lambda c, t: c.http.delete(f"/{checkpoint_path(t.weights)}"),
    "run": lambda c, t: c.http.get(f"/runs/{t.run}"),
    "cancel run": lambda c, t: c.http.delete(f"/runs/{t.run}"),
    "adapter": lambda c, t: c.http.get(f"/adapters/{t.model}"),
    "close adapter": lambda c, t: c.http.delete(f"/adapters/{t.model}"),
    "finish": lambda c, t: c.post(f"sessions/{t.session}/finish", reason={"type": "success"}),
}  # fmt: skip

# What everybody may ask, and is told of what is their own alone.
OWN: dict[str, Request] = {
    "config": lambda c, t: c.post("client/config", sdk_version="0.38.0"),
    "dynamic_config": lambda c, t: c.post("client/dynamic_config", sdk_version="0.38.0"),
    "create_session": lambda c, t: c.post(
        "create_session", tags=[], user_metadata={}, sdk_version="0.38.0"
    ),
    "telemetry": lambda c, t: c.post("telemetry", events=[], session_id=t.session),
    "capabilities": lambda c, t: c.http.get("/get_server_capabilities"),
    "training_runs": lambda c, t: c.http.get("/training_runs?limit=1000"),
    "all checkpoints": lambda c, t: c.http.get("/checkpoints?limit=1000"),
    "submit run": lambda c, t: c.post(
        "runs", adapter=entry("his", steps=1), data={"train": lines(count=8)}
    ),
    "runs": lambda c, t: c.http.get("/runs?limit=1000"),
    "adapters": lambda c, t: c.http.get("/adapters"),
}  # fmt: skip


class Recorder(RawClient):
    """Writes down what would be sent."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.session_id = MISSING.session
        self.http = httpx.Client(
            base_url="http://server/api/v1", transport=httpx.MockTransport(self._note)
        )

    def _note(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path))
        return httpx.Response(404)


def test_no_route_is_left_out_of_the_matrix():
    """Seen to fail with any one row taken out, and with a new route in the application."""
    app = application(FakeHub(), metrics=str)
    recorder = Recorder()
    for request in (*ROUTES.values(), *OWN.values()):
        request(recorder, MISSING)
    assert unasked(app, recorder.asked) == []
    assert not unknown(app)


def said(answer: httpx.Response, things: Things) -> tuple[int, str]:
    """Status and body, without the number of the request and with the identifiers taken out."""
    body = answer.json()
    body.pop("request_id", None)
    text = json.dumps(body)
    for name in ("state", "weights", "external", "future", "sampler", "model", "session"):
        text = text.replace(getattr(things, name), f"<{name}>")
    return answer.status_code, text


def test_every_route_answers_a_stranger_as_if_there_were_nothing(
    keyed: tuple[Server, str, str], things: Things, connect
):
    server, ann, bob = keyed
    stranger = RawClient(server, bob)
    stranger.open_session()
    for name, request in ROUTES.items():
        theirs, nobodys = request(stranger, things), request(stranger, MISSING)
        assert 400 <= theirs.status_code < 500, f"{name}: {theirs.status_code} {theirs.text}"
        assert theirs.status_code not in (408, 409, 429), name
        assert said(theirs, things) == said(nobodys, MISSING), name
    for name, request in OWN.items():
        answer = request(stranger, things)
        assert answer.status_code == 200, f"{name}: {answer.text}"
        assert not [one for one in vars(things).values() if one in answer.text], name
    # Nothing happened to what ann has.
    owner = RawClient(server, ann)
    for name in ("heartbeat", "get_info", "retrieve_future", "samplers", "weights_info", "adapter"):
        assert ROUTES[name](owner, things).status_code == 200, name
    listed = owner.ok(owner.http.get(f"/training_runs/{things.model}/checkpoints"))["checkpoints"]
    assert {one["tinker_path"] for one in listed} == {things.state, things.weights, things.external}
    assert not any(one.get("expires_at") or one["public"] for one in listed)
    assert Plain(server, ann).until(things.run)["status"] == "completed"


def test_a_stranger_can_neither_load_nor_list(
    keyed: tuple[Server, str, str], things: Things, connect
):
    server, _, bob = keyed
    service = connect(server, bob)
    for path in (things.state, MISSING.state):
        with pytest.raises(tinker.TinkerError):
            service.create_training_client_from_state(path).result()
    for path in (things.weights, MISSING.weights):
        with pytest.raises(tinker.TinkerError):
            service.create_sampling_client(model_path=path).result()
    rest = tinker.RestClient(base_url=server.url, api_key=bob)
    listed = rest.list_user_checkpoints().result().checkpoints
    assert not [one for one in listed if one.tinker_path.startswith(f"tinker://{things.model}/")]
    runs = rest.list_training_runs().result().training_runs
    assert things.model not in [one.training_run_id for one in runs]


def test_what_is_published_can_be_loaded_by_others(
    keyed: tuple[Server, str, str], things: Things, connect
):
    server, ann, bob = keyed
    owner = tinker.RestClient(base_url=server.url, api_key=ann)
    owner.publish_checkpoint_from_tinker_path(things.state).result()
    loaded = connect(server, bob).create_training_client_from_state(things.state).result()
    own = connect(server, ann).create_training_client_from_state(things.state).result()
    assert_same_bits(forward(loaded, PROBE), forward(own, PROBE))
    stranger = RawClient(server, bob)
    for name in ("ttl", "publish", "unpublish", "delete state"):
        assert 400 <= ROUTES[name](stranger, things).status_code < 500, name
    assert ROUTES["weights_info"](stranger, things).status_code == 200  # it still is
    assert ROUTES["unpublish"](RawClient(server, ann), things).status_code == 200
    assert ROUTES["weights_info"](stranger, things).status_code == 404


@pytest.mark.parametrize("key", ["tml-nobody", "", None])
def test_without_a_valid_key_nothing_is_answered(keyed: tuple[Server, str, str], key: Any):
    server, ann, _ = keyed
    headers = {} if key is None else {"X-API-Key": key}
    with httpx.Client(base_url=server.url, headers=headers, trust_env=False) as client:
        for path in ("create_session", "client/config", "retrieve_future", "weights_info"):
            assert client.post(f"/api/v1/{path}", json={}).status_code == 401, path
        for path in ("training_runs", "checkpoints", "get_server_capabilities"):
            assert client.get(f"/api/v1/{path}").status_code == 401, path
        assert client.get("/healthz").status_code == 200
    assert not any(ann in line for line in server.log)


def test_keys_come_and_go_while_the_server_runs(keyed: tuple[Server, str, str]):
    server, _, _ = keyed
    key = create_key(server.folder, "cat")

    def status() -> int:
        raw = RawClient(server, key)
        return raw.http.get("/checkpoints").status_code

    def becomes(expected: int) -> bool:
        end = time.monotonic() + 20  # what a key is known as is remembered for a while
        while status() != expected and time.monotonic() < end:
            time.sleep(0.1)
        return status() == expected

    assert becomes(200)
    listed = run_keys(server.folder, "list")
    assert "cat" in listed
    assert key not in listed  # only its hash is kept
    run_keys(server.folder, "revoke", "cat")
    assert becomes(401)
