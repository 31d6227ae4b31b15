"""Keys, tenants, and what is written down of a request."""

import asyncio
import contextlib
import json
import logging

import pytest

from manylora.service.http.auth import DevAuthenticator
from manylora.service.http.signing import Grant, Signer
from manylora.service.http_errors import Gone, NotFound
from tests.unit.service.client import Client, Keys, application
from tests.unit.service.fake_hub import EXTERNAL, MODEL, FakeHub

INFO = {"model_id": MODEL}


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="manylora.access")

    def read() -> list[dict[str, object]]:
        return [json.loads(r.getMessage()) for r in caplog.records if r.name == "manylora.access"]

    return read


# --- keys -------------------------------------------------------------------------------------


def test_a_key_is_a_tenant():
    hub = FakeHub()
    app = application(hub)
    assert Client(app).post("get_info", INFO).status_code == 200
    assert Client(app, "tml-bob").post("get_info", INFO).status_code == 404
    assert [tenant for tenant, _ in hub.asked] == ["alice", "bob"]


@pytest.mark.parametrize(
    "key", ["", "tml-", "tml-carol", "alice", "tml-alice ", "t" * 5000, "\xe9"]
)
def test_an_unknown_key_is_a_401_in_json(key):
    hub = FakeHub()
    client = Client(application(hub), None)
    header = {"x-api-key": key} if key.isascii() else {}
    if key == "tml-alice ":
        header["x-api-key"] = "tml-alice x"
    answer = client.call("POST", "/api/v1/get_info", json=INFO, headers=header)
    assert answer.status_code == 401
    assert answer.json()["category"] == "user"
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert hub.asked == []


def test_two_keys_are_none():
    async def ask() -> int:
        app, statuses = application(FakeHub()), []
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/api/v1/checkpoints",
            "query_string": b"",
            "headers": [(b"x-api-key", b"tml-alice"), (b"x-api-key", b"tml-bob")],
            "client": ("127.0.0.1", 1),
        }

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            statuses.append(message.get("status"))

        await app(scope, receive, send)
        return statuses[0]

    assert asyncio.run(ask()) == 401


def test_a_key_is_looked_up_once_for_a_while():
    keys = Keys()
    client = Client(application(FakeHub(), authenticator=keys))
    for _ in range(3):
        client.post("get_info", INFO)
    assert keys.asked == 1
    other = Client(client.app, "tml-nobody")
    for _ in range(3):
        assert other.post("get_info", INFO).status_code == 401
    assert keys.asked == 2


def test_the_development_tenant_is_of_this_machine_only():
    hub = FakeHub()
    app = application(hub, authenticator=DevAuthenticator(), local_only=True)
    assert Client(app, "tml-anything").get("/api/v1/checkpoints").status_code == 200
    assert hub.asked[-1][0] == "dev"
    assert Client(app, "sk-anything").get("/api/v1/checkpoints").status_code == 401
    assert Client(app, "tml-x", host="::1").get("/api/v1/checkpoints").status_code == 200
    away = Client(app, "tml-anything", host="10.0.0.7").get("/api/v1/checkpoints")
    assert (away.status_code, "keys create" in away.json()["error"]) == (401, True)
    assert Client(app, None, host="10.0.0.7").get("/healthz").status_code == 200


# --- one line for each request ----------------------------------------------------------------


def test_a_line_says_who_asked_what_and_how_it_went(lines):
    client = Client(application(FakeHub()))
    answers = [
        client.post("get_info", INFO),
        client.get(f"/api/v1/training_runs/{MODEL}/checkpoints?access_scope=secret"),
        client.get("/api/v1/no_such"),
        Client(client.app, "tml-secret").post("get_info", INFO),
    ]
    wanted = [
        ("alice", "POST", "/api/v1/get_info", 200),
        ("alice", "GET", "/api/v1/training_runs/{model_id}/checkpoints", 200),
        ("alice", "GET", "unknown", 404),
        (None, "POST", "unknown", 401),
    ]
    for line, answer, (tenant, method, route, status) in zip(lines(), answers, wanted, strict=True):
        assert line["request_id"] == answer.headers["x-request-id"]
        assert (line["tenant"], line["method"], line["route"]) == (tenant, method, route)
        assert line["status"] == status
        assert isinstance(line["ms"], float)


def test_nothing_that_was_sent_is_written_down(caplog):
    caplog.set_level(logging.DEBUG)
    hub = FakeHub()
    client = Client(application(hub), "tml-alice")
    body = {"tags": ["a secret"], "user_metadata": {"a": "secret"}, "display_name": 5}
    assert client.post("create_session", body).status_code == 422
    client.post("retrieve_future", {"request_id": "secret"})
    Client(client.app, "tml-secret").post("get_info", INFO)
    ours = [record for record in caplog.records if record.name.startswith("manylora")]
    assert ours
    for record in ours:
        assert "secret" not in record.getMessage()
        assert "tml-" not in record.getMessage()


def test_a_bug_is_written_down_with_its_request(lines):
    hub = FakeHub()
    hub.broken = RuntimeError("oh")
    answer = Client(application(hub)).post("get_info", INFO)
    (line,) = lines()
    assert (line["status"], line["request_id"]) == (500, answer.headers["x-request-id"])


def test_ids_differ():
    client = Client(application(FakeHub()))
    ids = {client.get("/healthz").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


# --- signed addresses -------------------------------------------------------------------------


def test_a_token_says_what_it_was_made_for_and_nothing_else():
    signer = Signer(b"one")
    grant = Grant("alice", EXTERNAL, "a.json", 2**40)
    token = signer.token(grant)
    assert signer.grant(token) == grant
    with pytest.raises(NotFound):
        Signer(b"two").grant(token)
    payload, seal = token.split(".")
    other, _ = signer.token(Grant("bob", EXTERNAL, "a.json", 2**40)).split(".")
    for bad in (
        f"{other}.{seal}",
        payload,
        f"{payload}.",
        f"{payload}.{seal}.{seal}",
        "",
        ".",
        "é.é",
    ):
        with pytest.raises(NotFound):
            signer.grant(bad)
    for place in range(len(token)):
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with contextlib.suppress(NotFound):
            assert signer.grant(changed) == grant  # unused bits of the last character


def test_a_token_expires():
    signer = Signer(b"one")
    with pytest.raises(Gone):
        signer.grant(signer.token(Grant("alice", EXTERNAL, "a.json", 1)))
