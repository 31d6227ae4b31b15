"""Every route over a hub in memory: what it hands on, what it answers, what it refuses."""

import json
import time

import pytest

from manylora.service.contract import PROTOBUF_TYPE
from manylora.service.http.context import ContextSettings
from manylora.service.http.routes_refused import REFUSED
from manylora.service.http_errors import Backpressure, QuotaExceeded
from manylora.service.wire import messages
from manylora.service.wire.pieces import ForwardBackwardSubmit, SampleSubmit
from manylora.types import Cancelled, DataError, SaveFailed, StepRefused
from tests.route_table import unasked
from tests.unit.service.bodies import plain_datum, request
from tests.unit.service.client import Client, application
from tests.unit.service.fake_hub import (
    MODEL,
    SAMPLER,
    SESSION,
    WEIGHTS,
    FakeHub,
)
from tests.unit.service.test_runs_routes import ROUTES as RUN_ROUTES

PATH = f"/api/v1/training_runs/{MODEL}/checkpoints/weights/step-1"
ADAM = {"learning_rate": 0.1}

# method, path, body → status; what alice may do, and what another tenant is told.
JSON_ROUTES = [
    ("POST", "/api/v1/client/config", {"sdk_version": "0.38.0"}, 200),
    ("POST", "/api/v1/client/dynamic_config", {"sdk_version": "0.38.0"}, 200),
    ("POST", "/api/v1/create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0"}, 200),
    ("POST", "/api/v1/telemetry", {"events": [{"a": 1}], "session_id": "x"}, 200),
    ("GET", "/api/v1/get_server_capabilities", None, 200),
    ("GET", "/api/v1/healthz", None, 200),
    ("GET", "/api/v1/training_runs", None, 200),
    ("GET", "/api/v1/checkpoints?limit=5&offset=2", None, 200),
    ("POST", "/api/v1/session_heartbeat", {"session_id": SESSION}, 404),
    ("POST", f"/api/v1/sessions/{SESSION}/finish", {"reason": {"type": "success"}}, 404),
    (
        "POST",
        "/api/v1/create_model",
        {
            "session_id": SESSION,
            "model_seq_id": 0,
            "base_model": "base",
            "lora_config": {"rank": 4},
        },
        404,
    ),
    (
        "POST",
        "/api/v1/load_weights",
        {"session_id": SESSION, "model_seq_id": 1, "path": str(WEIGHTS), "optimizer": True},
        404,
    ),
    ("POST", "/api/v1/get_info", {"model_id": MODEL}, 404),
    ("POST", "/api/v1/optim_step", {"model_id": MODEL, "seq_id": 1, "adam_params": ADAM}, 404),
    ("POST", "/api/v1/save_weights", {"model_id": MODEL, "seq_id": 1, "path": "a"}, 404),
    (
        "POST",
        "/api/v1/save_weights_for_sampler",
        {"model_id": MODEL, "seq_id": 1, "sampling_session_seq_id": 0, "kind": "inflight"},
        404,
    ),
    ("POST", "/api/v1/save_weights_external", {"model_id": MODEL, "seq_id": 1, "path": "a"}, 404),
    (
        "POST",
        "/api/v1/create_sampling_session",
        {"session_id": SESSION, "sampling_session_seq_id": 0, "base_model": "base"},
        404,
    ),
    ("GET", f"/api/v1/samplers/{SAMPLER}", None, 404),
    (
        "POST",
        "/api/v1/asample",
        {
            "sampling_session_id": SAMPLER,
            "seq_id": 0,
            "num_samples": 2,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
            "sampling_params": {},
        },
        404,
    ),
    ("POST", "/api/v1/retrieve_future", {"request_id": "step"}, 404),
    ("GET", f"/api/v1/training_runs/{MODEL}", None, 404),
    ("GET", f"/api/v1/training_runs/{MODEL}?access_scope=owned", None, 404),
    ("GET", f"/api/v1/training_runs/{MODEL}/checkpoints", None, 404),
    ("DELETE", PATH, None, 404),
    ("PUT", f"{PATH}/ttl", {"ttl_seconds": 7200}, 404),
    ("PUT", f"{PATH}/ttl", {"ttl_seconds": None}, 404),
    ("POST", f"{PATH}/publish", None, 404),
    ("DELETE", f"{PATH}/publish", None, 404),
    (
        "POST",
        "/api/v1/copy_weights",
        {"source_path": str(WEIGHTS), "destination_project_id": "any"},
        404,
    ),
    ("POST", "/api/v1/weights_info", {"tinker_path": str(WEIGHTS)}, 404),
    (
        "GET",
        f"/api/v1/training_runs/{MODEL}/checkpoints/external_weights/out/external_weights_urls",
        None,
        404,
    ),
]
IDS = [f"{method} {path}" for method, path, _, _ in JSON_ROUTES]


@pytest.fixture
def hub():
    return FakeHub()


@pytest.fixture
def alice(hub):
    return Client(application(hub))


@pytest.fixture
def bob(alice):
    return Client(alice.app, "tml-bob")


@pytest.mark.parametrize(("method", "path", "body", "others"), JSON_ROUTES, ids=IDS)
def test_every_route(alice, bob, method, path, body, others):
    given = {} if body is None else {"json": body}
    mine = alice.call(method, path, **given)
    assert mine.status_code == 200, mine.text
    assert mine.headers["content-type"].startswith("application/json")
    assert None not in mine.json().values()  # the SDK's models take an absent field, not a null
    theirs = bob.call(method, path, **given)
    assert theirs.status_code == others
    nobody = Client(alice.app, None).call(method, path, **given)
    assert nobody.status_code == (200 if path == "/api/v1/healthz" else 401)


@pytest.mark.parametrize(
    ("method", "path", "body", "others"),
    [row for row in JSON_ROUTES if row[3] == 404],
    ids=[f"{row[0]} {row[1]}" for row in JSON_ROUTES if row[3] == 404],
)
def test_another_tenants_id_and_a_missing_one_are_told_the_same(hub, method, path, body, others):
    alice, bob = Client(application(hub)), Client(application(hub), "tml-bob")
    swap = {MODEL: "s1:train:9", SAMPLER: "s1:sample:9", SESSION: "s9", "step": "no-such"}
    swap[str(WEIGHTS)] = "tinker://s1:train:9/weights/step-1"
    missing_body = {k: swap.get(v, v) if isinstance(v, str) else v for k, v in (body or {}).items()}
    if "load_weights" in path:  # the session is not what this fake looks at
        missing_body["path"] = "tinker://s1:train:9/weights/step-1"
    missing_path = path.replace(MODEL, "s1:train:9").replace(SAMPLER, "s1:sample:9")
    missing_path = missing_path.replace(f"sessions/{SESSION}/", "sessions/s9/")
    of_bob = bob.call(method, path, **({} if body is None else {"json": body}))
    of_none = alice.call(method, missing_path, **({} if body is None else {"json": missing_body}))
    assert of_bob.status_code == of_none.status_code == 404
    assert of_bob.json()["error"] == of_none.json()["error"]


def test_no_route_is_left_out(alice):
    asked = {(method, path.partition("?")[0]) for method, path, _, _ in (*JSON_ROUTES, *RUN_ROUTES)}
    # These two answer in another form than the rest, and have tests of their own.
    bytes_of = [
        ("GET", "/api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/archive"),
        ("POST", "/api/v1/forward_backward"),
    ]
    assert unasked(alice.app, asked) == bytes_of


def test_another_tenants_forward_backward_is_nobodys(alice, bob):
    theirs = bob.forward_backward(request(model_id=MODEL, seq_id=3).SerializeToString())
    nobodys = alice.forward_backward(request(model_id="s1:train:9", seq_id=3).SerializeToString())
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.json()["error"] == nobodys.json()["error"]
    nobody = Client(alice.app, None)
    assert nobody.forward_backward(request(model_id=MODEL).SerializeToString()).status_code == 401


def test_what_the_hub_gets(hub, alice):
    alice.forward_backward(request(model_id=MODEL, seq_id=3).SerializeToString())
    tenant, submit = hub.asked[-1]
    assert tenant == "alice"
    assert isinstance(submit, ForwardBackwardSubmit)
    assert (submit.seq_id, submit.data[0].tokens.tolist()) == (3, [1, 2, 3])

    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    content = {"sampling_session_id": SAMPLER, "seq_id": 7, "num_samples": 2, "prompt": prompt}
    answer = alice.post("asample", content).json()
    assert len(answer["sample_sequence_ids"]) == 2
    submit = hub.asked[-1][1]
    assert isinstance(submit, SampleSubmit)
    assert submit.prompt.tolist() == [1, 2]

    load = {"session_id": SESSION, "model_seq_id": 1, "path": str(WEIGHTS), "optimizer": False}
    alice.post("load_weights", load)
    message, path = hub.asked[-1][1]
    assert isinstance(message, messages.LoadWeightsRequest)
    assert (message.target, path) == (messages.Slot(SESSION, 1), WEIGHTS)

    alice.call("DELETE", PATH)
    assert hub.asked[-1] == ("alice", ("delete", WEIGHTS))
    alice.call("PUT", f"{PATH}/ttl", json={"ttl_seconds": 7200})
    assert hub.asked[-1] == ("alice", (WEIGHTS, 7200))
    alice.get("/api/v1/checkpoints?limit=5000&offset=2")
    assert hub.asked[-1] == ("alice", (1000, 2))


def test_a_large_body_is_read_too(hub, alice):
    """In a thread; it must come to the same."""
    body = request([plain_datum(500)] * 20, model_id=MODEL).SerializeToString()
    assert len(body) > 64 * 1024
    assert alice.forward_backward(body).status_code == 200
    assert hub.asked[-1][1].num_tokens == 10_000
    content = {
        "sampling_session_id": SAMPLER,
        "seq_id": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [12345] * 20_000}]},
    }
    assert alice.post("asample", content).status_code == 200
    assert hub.asked[-1][1].prompt.size == 20_000


# --- results ----------------------------------------------------------------------------------


def test_results(alice):
    step = alice.post("retrieve_future", {"request_id": "step"})
    assert (step.status_code, step.json()) == (200, {"metrics": {"grad_norm": 1.0}})
    forward = alice.post("retrieve_future", {"request_id": "forward", "allow_metadata_only": True})
    assert forward.headers["content-type"] == PROTOBUF_TYPE
    failed = alice.post("retrieve_future", {"request_id": "failed"})
    assert failed.status_code == 200
    assert failed.json() == {"error": "data[0]: too long", "category": "user"}
    assert alice.post("retrieve_future", {"request_id": "old"}).status_code == 410
    assert alice.post("retrieve_future", {"request_id": "no-such"}).status_code == 404


def test_not_yet_is_never_said_at_once(hub):
    """The SDK asks again without a pause: the pause is ours, even if the hub makes none."""
    alice = Client(application(hub, ContextSettings(least_poll_seconds=0.5)))
    started = time.monotonic()
    waiting = alice.post("retrieve_future", {"request_id": "waiting"})
    assert time.monotonic() - started >= 0.5
    assert waiting.status_code == 408
    assert waiting.json()["queue_state"] == "paused_capacity"
    assert waiting.json()["queue_state_reason"] == "no room"


def test_a_large_result_is_announced_if_the_client_allows(alice):
    asked = {"request_id": "large", "allow_metadata_only": True}
    announced = alice.post("retrieve_future", asked).json()
    assert announced == {"status": "complete_metadata", "response_payload_size": 100}
    whole = alice.post("retrieve_future", {**asked, "allow_metadata_only": False})
    assert whole.content == b"\0" * 100


# --- refusals use the number up ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (request(model_id=MODEL, seq_id=5, loss="custom").SerializeToString(), 400),
        (request(model_id=MODEL, seq_id=5, loss="").SerializeToString(), 400),
        (request(model_id=MODEL, seq_id=5).SerializeToString()[:-1], 400),
        (request(model_id=MODEL, seq_id=5).SerializeToString() + b"\x1a\x00" * 5000, 413),
    ],
)
def test_a_refused_forward_backward_uses_its_number_up(hub, alice, body, status):
    answer = alice.forward_backward(body)
    assert answer.status_code == status
    ((tenant, model_id, seq_id, error),) = hub.refused
    assert (tenant, model_id, seq_id) == ("alice", MODEL, 5)
    assert str(error) == answer.json()["error"]
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("optim_step", {"adam_params": {"learning_rate": -1}}, 400),
        ("optim_step", {"adam_params": {"learning_rate": "x"}}, 422),
        ("optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 1}}, 400),
        ("optim_step", {}, 422),
        ("optim_step", {"adam_params": {"learning_rate": float("inf")}}, 422),
        ("save_weights", {"path": "a/b"}, 422),
        ("save_weights", {"path": ".."}, 422),
        ("save_weights", {"path": "a", "ttl_seconds": 1}, 422),
        ("save_weights_for_sampler", {}, 422),
        ("save_weights_for_sampler", {"path": "a", "sampling_session_seq_id": 1}, 422),
        ("save_weights_external", {"path": "a", "age_encryption_recipients": ["age1x"]}, 400),
        ("load_weights", {"path": "file:///etc", "optimizer": True}, 400),
        ("load_weights", {"path": str(WEIGHTS), "optimizer": True, "session_id": "s"}, 422),
        (
            "load_weights",
            {"path": str(WEIGHTS), "optimizer": True, "weights_access_token": "t"},
            400,
        ),
    ],
)
def test_a_refused_numbered_request_uses_its_number_up(hub, alice, name, content, status):
    body = json.dumps({"model_id": MODEL, "seq_id": 9, **content})  # httpx refuses Infinity
    kind = {"content-type": "application/json"}
    answer = alice.call("POST", f"/api/v1/{name}", content=body, headers=kind)
    assert answer.status_code == status, answer.text
    assert [row[:3] for row in hub.refused] == [("alice", MODEL, 9)]
    assert hub.asked == []


def test_what_the_hub_refuses_is_the_hubs_affair(hub, alice):
    hub.broken = DataError("the name is taken")
    answer = alice.post("save_weights", {"model_id": MODEL, "seq_id": 1, "path": "a"})
    assert (answer.status_code, hub.refused) == (400, [])


def test_known_routes_that_are_not_served_are_refused_by_name(alice):
    for method, path, why in REFUSED:
        place = path.replace("{what:path}", "usage/events").replace("{", "").replace("}", "")
        answer = alice.call(method, f"/api/v1{place}")
        assert answer.status_code == 400, place
        assert why in answer.json()["error"]


def test_other_optimizers_and_full_training_are_refused_by_name(alice):
    model = {"session_id": SESSION, "model_seq_id": 0, "base_model": "base"}
    assert "lora_config" in alice.post("create_model", model).json()["error"]
    model |= {"lora_config": {"rank": 4}, "optimizer_config": {"type": "dimuon", "version": 1}}
    answer = alice.post("create_model", model)
    assert (answer.status_code, "'dimuon'" in answer.json()["error"]) == (400, True)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "category"),
    [
        (DataError("wrong"), 400, "user"),
        (StepRefused("dropped"), 400, "user"),
        (QuotaExceeded("200 adapters are all you may have"), 400, "user"),
        (Backpressure("come again"), 429, "server"),
        (SaveFailed("the disk is full"), 503, "server"),
        (Cancelled("closing"), 503, "server"),
    ],
)
def test_errors_of_the_hub(hub, alice, error, status, category):
    hub.broken = error
    answer = alice.post("get_info", {"model_id": MODEL})
    assert answer.status_code == status
    assert answer.json()["error"] == str(error)
    assert answer.json()["category"] == category
    assert (answer.headers.get("retry-after") is not None) == (status in (429, 503))


def test_a_bug_tells_the_client_nothing_but_where_to_look(hub, alice, caplog):
    hub.broken = RuntimeError("a secret")
    answer = alice.post("get_info", {"model_id": MODEL})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]
    (record,) = [record for record in caplog.records if record.name == "manylora.service"]
    assert answer.headers["x-request-id"] in record.getMessage()
    assert record.exc_info is not None


def test_no_such_route_and_method(alice):
    assert alice.get("/api/v1/no_such").json()["error"] == "there is no such route"
    assert alice.get("/api/v1/get_info").status_code == 405
    assert alice.get("/api/v1/checkpoints?limit=x").status_code == 422
    assert alice.get("/docs").status_code == 404
