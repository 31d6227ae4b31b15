"""A refused request uses its number up, and counts as a failed operation."""

import json
from collections.abc import Iterator

import pytest

from tests.wire.data import random_data
from tests.wire.raw import PROTOBUF, RawClient, encode
from tests.wire.server import Server
from tests.wire.test_many_adapters import STEP


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    raw = RawClient(server)
    raw.open_session()
    yield raw
    raw.close()


def send(client: RawClient, body: bytes) -> int:
    answer = client.http.post("/forward_backward", content=body, headers={"Content-Type": PROTOBUF})
    return answer.status_code


REFUSED = {
    "a loss that is not served": (400, lambda m: encode(m, 2, random_data(1, 1), "custom")),
    "a body that is cut off": (400, lambda m: encode(m, 2, random_data(1, 1))[:-3]),
    "a body that is too large": (
        413,
        lambda m: encode(m, 2, random_data(1, 1)) + b"\0" * (65 << 20),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_comes_after_a_refused_forward_backward(client: RawClient, case: str):
    status, body = REFUSED[case]
    model = client.new_model()
    first = client.ok(client.forward_backward(model, 1, random_data(0, 1)))
    assert send(client, body(model)) == status
    # The gradient of the first is dropped with the step that the second was to be part of.
    step = client.ok(client.optim_step(model, 3, STEP))
    assert "error" not in str(client.losses(first["request_id"]).metrics)
    refused = client.result(step["request_id"])
    assert refused["category"] == "user" and "dropped" in refused["error"]
    client.ok(client.forward_backward(model, 4, random_data(0, 1)))
    again = client.result(client.ok(client.optim_step(model, 5, STEP))["request_id"])
    assert again["metrics"]["optim/step"] == 1


def test_a_refused_optim_step_drops_its_gradient(client: RawClient):
    model = client.new_model()
    client.ok(client.forward_backward(model, 1, random_data(0, 1)))
    bad = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": "fast"}}
    assert client.http.post("/optim_step", content=json.dumps(bad)).status_code in (415, 422)
    assert client.post("optim_step", **bad).status_code == 422
    step = client.ok(client.optim_step(model, 3, STEP))
    assert client.result(step["request_id"])["category"] == "user"


def test_an_adapter_of_a_million_ranks(client: RawClient):
    answer = client.create_model(0, rank=1_000_000)
    assert answer.status_code == 422
    told = answer.json()
    assert told["category"] == "user" and "lora_config.rank" in told["error"]
    assert client.new_model(1)
