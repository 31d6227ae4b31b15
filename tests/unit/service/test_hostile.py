"""Clients that mean harm: whatever they send, they are told no, and nothing breaks."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora.service.contract import PROTOBUF_TYPE
from manylora.service.http.body_limits import BodyLimits
from manylora.service.http.context import ContextSettings
from tests.unit.service.bodies import plain_datum, request
from tests.unit.service.client import QUICK, Client, application
from tests.unit.service.fake_hub import MODEL, SESSION, FakeHub
from tests.unit.service.test_routes import JSON_ROUTES

BODIES = [(method, path.partition("?")[0], body) for method, path, body, _ in JSON_ROUTES if body]
ROUTES = [(method, path.partition("?")[0]) for method, path, _, _ in JSON_ROUTES]

HUB = FakeHub()
ALICE = Client(application(HUB))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\x00", MODEL, SESSION, "../..", "tinker://a/weights/b", "a" * 5000])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def told(answer: Any) -> None:
    """A clear answer: no 5xx, and JSON with the reason if it is a refusal."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json().keys() >= {"error", "category", "request_id"}
        assert len(answer.content) < 4096


def fields_of(body: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(body, values)).map(
        lambda changed: {**body, **changed}
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.parametrize(
    ("method", "path", "body"), BODIES, ids=[f"{m} {p} {i}" for i, (m, p, _) in enumerate(BODIES)]
)
def test_fields_of_any_kind(method, path, body, data):
    content = json.dumps(data.draw(fields_of(body))).encode()
    told(ALICE.call(method, path, content=content, headers={"content-type": "application/json"}))


GARBAGE = {
    "nothing": b"",
    "no JSON": b"\xff\xfe\x00",
    "cut off": b'{"model_id": "a"',
    "another type": b"[]",
    "null": b"null",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"user_metadata":' * 50_000,
    "deep in a field": b'{"session_id":"s1","user_metadata":{"a":'
    + b"[" * 5000
    + b"]" * 5000
    + b"}}",
    "a huge number": b'{"seq_id":' + b"9" * 5000 + b',"model_id":"a"}',
    "a lone surrogate": b'{"model_id":"\\ud800","seq_id":1}',
    "twice the same key": b'{"model_id":"a","model_id":"b","seq_id":1}',
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_everywhere(content):
    for method, path in ROUTES:
        if method != "GET":
            kind = {"content-type": "application/json"}
            told(ALICE.call(method, path, content=content, headers=kind))
    told(ALICE.forward_backward(content))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_as_protobuf(body):
    answer = ALICE.forward_backward(body)
    told(answer)
    assert answer.status_code >= 400


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-protobuf", "application/jsonp", "a" * 3000]
)
def test_another_content_type(kind):
    answer = ALICE.call("POST", "/api/v1/get_info", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415
    told(answer)


def test_json_forward_backward_is_refused_by_name():
    answer = ALICE.post("forward_backward", {"model_id": MODEL, "seq_id": 1})
    assert (answer.status_code, "0.25.0" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("encoding", ["zstd", "gzip", "gzip, gzip", "br"])
def test_compressed_bodies_are_refused(encoding):
    body = request(model_id=MODEL).SerializeToString()
    answer = ALICE.forward_backward(body, **{"content-encoding": encoding})
    assert answer.status_code == 415
    assert ALICE.forward_backward(body, **{"content-encoding": "identity"}).status_code == 200


ODD_IDS = [
    "a%00b", "%2e%2e", "..%2f..", "a" * 5000, "%ff%fe", "tinker:%2f%2fa", "a b", "é", "%0a", "'--",
    "{model_id}", "%25",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_IDS)
def test_odd_ids_are_ids_of_nothing(name):
    for method, path in (
        ("GET", f"/api/v1/training_runs/{name}"),
        ("GET", f"/api/v1/training_runs/{name}/checkpoints"),
        ("DELETE", f"/api/v1/training_runs/{name}/checkpoints/weights/a"),
        ("DELETE", f"/api/v1/training_runs/{MODEL}/checkpoints/{name}/a"),
        ("DELETE", f"/api/v1/training_runs/{MODEL}/checkpoints/weights/{name}"),
        ("GET", f"/api/v1/samplers/{name}"),
        ("GET", f"/api/v1/external_weights/{name}"),
    ):
        answer = ALICE.call(method, path)
        told(answer)
        assert answer.status_code in (404, 405)


def test_paths_do_not_lead_out_of_the_data():
    hub = FakeHub()
    alice = Client(application(hub))
    for name in ("..", ".", "a/../../b", "%2e%2e", "/etc/passwd", "a\\b", "C:", "x" * 200):
        body = {"model_id": MODEL, "seq_id": 1, "path": name}
        assert alice.post("save_weights", body).status_code == 422, name
        path = f"tinker://{MODEL}/weights/{name}"
        assert alice.post("weights_info", {"tinker_path": path}).status_code == 400, name
    assert hub.asked == []


# --- sizes ------------------------------------------------------------------------------------

TINY = ContextSettings(
    bodies=BodyLimits(ordinary=200, by_path={"/api/v1/forward_backward": 5000}, drained=20_000),
    poll_seconds=QUICK.poll_seconds,
    least_poll_seconds=QUICK.least_poll_seconds,
)


async def streamed(*parts: bytes):
    for part in parts:
        yield part


def test_a_body_beyond_the_limit_is_told_the_limit_and_its_number_is_used_up():
    hub = FakeHub()
    alice = Client(application(hub, TINY))
    body = request([plain_datum(50)] * 10, model_id=MODEL, seq_id=6).SerializeToString()
    assert 5000 < len(body) < 20_000
    answer = alice.forward_backward(body)
    assert answer.status_code == 413
    assert "5000 bytes" in answer.json()["error"]
    assert [row[:3] for row in hub.refused] == [("alice", MODEL, 6)]
    # The same without a length in the header, in pieces smaller than what the hook is promised.
    pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
    answer = alice.call(
        "POST",
        "/api/v1/forward_backward",
        content=streamed(*pieces),
        headers={"content-type": PROTOBUF_TYPE},
    )
    assert answer.status_code == 413
    assert [row[:3] for row in hub.refused] == [("alice", MODEL, 6)] * 2
    assert hub.asked == []


def test_a_json_body_beyond_the_limit():
    hub = FakeHub()
    alice = Client(application(hub, TINY))
    body = {"model_id": MODEL, "path": "a", "seq_id": 8, "user_metadata": {"a": "b" * 300}}
    answer = alice.post("save_weights", body)
    assert (answer.status_code, "200 bytes" in answer.json()["error"]) == (413, True)
    assert [row[:3] for row in hub.refused] == [("alice", MODEL, 8)]
    assert alice.post("create_session", {"tags": ["x" * 300]}).status_code == 413
    assert len(hub.refused) == 1


def test_a_body_at_the_limit_passes():
    hub = FakeHub()
    body = request(model_id=MODEL).SerializeToString()
    exact = ContextSettings(bodies=BodyLimits(by_path={"/api/v1/forward_backward": len(body)}))
    assert Client(application(hub, exact)).forward_backward(body).status_code == 200
    less = ContextSettings(bodies=BodyLimits(by_path={"/api/v1/forward_backward": len(body) - 1}))
    assert Client(application(hub, less)).forward_backward(body).status_code == 413


def test_an_endless_body_is_not_read_to_its_end():
    alice = Client(application(FakeHub(), TINY))
    taken = 0

    async def endless():
        nonlocal taken
        while True:
            taken += 1000
            yield b"x" * 1000

    kind = {"content-type": "application/json"}
    answer = alice.call("POST", "/api/v1/get_info", content=endless(), headers=kind)
    assert answer.status_code == 413
    assert 20_000 <= taken <= 23_000


def test_a_lie_about_the_length_helps_nobody():
    """A header may say less than what comes, if the server lets it; the bytes are counted."""
    alice = Client(application(FakeHub(), TINY))
    answer = alice.call(
        "POST",
        "/api/v1/get_info",
        content=b"x" * 300,
        headers={"content-type": "application/json", "content-length": "3"},
    )
    assert answer.status_code == 413
