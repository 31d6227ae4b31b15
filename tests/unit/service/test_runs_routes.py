"""The routes of the plain API: what they hand on, what they answer, what they refuse."""

import json
from typing import Any

import pytest

from tests.unit.service.client import Client, application
from tests.unit.service.fake_hub import MODEL, RUN, FakeHub

LINE = json.dumps({"prompt": "a", "completion": "b"})
ADAPTER = {"name": "mine", "sft": {"train": "x.jsonl", "max_steps": 3}}
SUBMIT = {"adapter": ADAPTER, "data": {"train": LINE}}

ROUTES = [
    ("POST", "/api/v1/runs", SUBMIT, 404),
    ("GET", "/api/v1/runs", None, 200),
    ("GET", f"/api/v1/runs/{RUN.id}?after=3", None, 404),
    ("DELETE", f"/api/v1/runs/{RUN.id}", None, 404),
    ("GET", "/api/v1/adapters", None, 200),
    ("GET", f"/api/v1/adapters/{MODEL}", None, 404),
    ("DELETE", f"/api/v1/adapters/{MODEL}", None, 404),
]


@pytest.mark.parametrize(("method", "path", "body", "others"), ROUTES)
def test_the_owner_and_everybody_else(method: str, path: str, body: Any, others: int) -> None:
    app = application(FakeHub())
    content = {} if body is None else {"json": body}
    assert Client(app).call(method, path, **content).status_code == 200
    assert Client(app, "tml-bob").call(method, path, **content).status_code == others
    assert Client(app, None).call(method, path, **content).status_code == 401


def test_a_submitted_run_is_handed_on_as_it_is() -> None:
    hub = FakeHub()
    reply = Client(application(hub)).post("runs", {**SUBMIT, "base_model": "base"})
    assert reply.json()["id"] == RUN.id and reply.json()["status"] == "running"
    ((tenant, request),) = hub.asked
    assert tenant == "alice" and request.base_model == "base"
    assert (request.adapter.name, request.adapter.sft.max_steps) == ("mine", 3)
    assert request.data.train == LINE and request.data.eval is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"adapter": ADAPTER, "code": "os.system"}, "code"),
        ({"adapter": {**ADAPTER, "hook": "a.py"}}, "adapter.hook"),
        ({"adapter": {**ADAPTER, "name": "../up"}}, "adapter.name"),
        ({"adapter": {**ADAPTER, "seed": -1}}, "adapter.seed"),
        ({"adapter": {**ADAPTER, "sft": {"train": "x.py"}}}, "adapter.sft.train"),
        ({"adapter": {**ADAPTER, "lora": {"rank": 0}}}, "adapter.lora.rank"),
        ({"adapter": {**ADAPTER, "optimizer": {"lr": "1"}}}, "adapter.optimizer.lr"),
        ({"adapter": ADAPTER, "data": {"train": ""}}, "data.train"),
        ({"adapter": ADAPTER, "data": {"train": LINE, "file": "/etc/passwd"}}, "data.file"),
        ({"adapter": ADAPTER, "data": [LINE]}, "data"),
        ({"data": {"train": LINE}}, "adapter"),
        ([], "body"),
    ],
)
def test_what_has_not_the_form_is_refused_by_its_field(body: Any, field: str) -> None:
    hub = FakeHub()
    reply = Client(application(hub)).post("runs", body)
    assert reply.status_code == 422 and f"{field}: " in reply.json()["error"]
    assert hub.asked == []


def test_half_a_surrogate_pair_never_reaches_a_file() -> None:
    body = json.dumps(SUBMIT).replace("x.jsonl", "x.jsonl").replace('\\"b\\"', '\\"\\ud800\\"')
    reply = Client(application(FakeHub())).call(
        "POST", "/api/v1/runs", {"content-type": "application/json"}, content=body.encode()
    )
    assert reply.status_code == 422


def test_ids_that_can_be_nobodys() -> None:
    alice = Client(application(FakeHub()))
    for path in ("runs/a%20b", "runs/%00", "adapters/a%2Fb"):
        assert alice.get(f"/api/v1/{path}").status_code == 404
    assert alice.get(f"/api/v1/runs/{RUN.id}?after=-1").status_code == 422
