"""Clients that mean harm, against a real server: whatever they send, no 5xx, nothing of others'
things in an answer, no future without an end; and others' next loss is what it would have been."""

import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok

from manylora.types import AdamParams
from tests.wire.data import FIRST_PLAIN_TOKEN, assert_same_bits, outputs, random_data
from tests.wire.raw import PROTOBUF, RawClient, encode
from tests.wire.server import Server, create_key

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 3)
PROMPT = tuple(range(FIRST_PLAIN_TOKEN, FIRST_PLAIN_TOKEN + 4))
EXAMPLES = 15
WAITING = re.compile(r"^manylora_requests_waiting (\S+)$", re.MULTILINE)

bounded = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
)  # fmt: skip


class Victim:
    """Somebody who trains before, during and after."""

    def __init__(self, server: Server, key: str) -> None:
        self.raw = RawClient(server, key)
        self.session = self.raw.open_session()
        self.models = [self.raw.new_model(number, rank=4, seed=7) for number in range(2)]
        self.pairs = 0
        self.sampler = self.raw.ok(self.raw.new_sampler(0))["sampling_session_id"]

    def learn(self, model: str, first: int, last: int) -> None:
        for pair in range(first, last):
            self.raw.ok(self.raw.forward_backward(model, 2 * pair + 1, random_data(pair, 3)))
            self.raw.ok(self.raw.optim_step(model, 2 * pair + 2, STEP))
        assert "error" not in self.raw.result(f"{model}:{2 * last}")

    def go_on(self) -> None:
        self.learn(self.models[0], self.pairs, self.pairs + 2)
        self.pairs += 2

    def is_unharmed(self) -> None:
        """The same training on the second model, all at once, comes to the same bits."""
        self.go_on()
        self.learn(self.models[1], 0, self.pairs)
        one, other = (self._probe(model, 2 * self.pairs + 1) for model in self.models)
        assert_same_bits(one, other)

    def _probe(self, model: str, seq: int) -> list[np.ndarray]:
        answer = self.raw.ok(self.raw.forward_backward(model, seq, PROBE, forward_only=True))
        return outputs(self.raw.losses(answer["request_id"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Victim, str]]:
    """A server, somebody to be harmed, and the key of who means harm."""
    folder = tmp_path_factory.mktemp("hostile")
    ann, eve = create_key(folder, "ann"), create_key(folder, "eve")
    with Server(folder, "--set", "long_poll_seconds=0.3") as server:
        victim = Victim(server, ann)
        victim.go_on()
        yield server, victim, eve
        victim.is_unharmed()
        assert not [line for line in server.log if "raceback" in line]
        assert not any(key in line for key in (ann, eve) for line in server.log)


@pytest.fixture
def eve(place: tuple[Server, Victim, str]) -> Iterator[RawClient]:
    """Who means harm. When her session is over, nothing of hers waits any more."""
    server, victim, key = place
    client = RawClient(server, key)
    client.open_session()
    yield client
    client.close()
    victim.go_on()
    nothing_waits(server)
    assert httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 200


def nothing_waits(server: Server) -> None:
    end = time.monotonic() + 30
    while (waiting := num_waiting(server)) > 0:
        assert time.monotonic() < end, f"{waiting} requests have no end"
        time.sleep(0.1)


def num_waiting(server: Server) -> float:
    key = {"X-API-Key": "tml-x"}
    text = httpx.get(f"{server.url}/metrics", headers=key, trust_env=False).text
    found = WAITING.search(text)
    assert found, text
    return float(found[1])


def told(answer: Any, victim: Victim) -> None:
    """No 5xx, and nothing of the victim's."""
    assert answer.status_code < 500, answer.text
    assert answer.status_code != 409
    if answer.status_code >= 400 and answer.status_code != 408:
        assert len(answer.content) < 4096
    assert b"Traceback" not in answer.content


# --- OpenAPI -----------------------------------------------------------------------------------


def ids_of(client: RawClient, model: str, sampler: str) -> dict[str, list[str]]:
    return {
        "session_id": [client.session_id],
        "model_id": [model],
        "sampling_session_id": [sampler],
        "sampler_id": [sampler],
        "request_id": [f"{model}:0", f"{model}:1", f"{sampler}:1"],
        "path": [f"tinker://{model}/weights/x"],
        "model_path": [f"tinker://{model}/sampler_weights/x"],
        "tinker_path": [f"tinker://{model}/weights/x"],
    }


def put_ids(case: Any, ids: dict[str, list[str]], draw: random.Random) -> None:
    """Some identifiers that exist in place of those that were made up."""
    for part in (case.path_parameters, case.body):
        if isinstance(part, dict):
            for name, known in ids.items():
                if name in part and draw.random() < 0.8:
                    part[name] = draw.choice(known)
    if isinstance(case.body, dict) and isinstance(case.body.get("seq_id"), int):
        case.body["seq_id"] = draw.choice((1, 2, 3, 10**9))


def test_schemathesis(place: tuple[Server, Victim, str], eve: RawClient):
    server, victim, key = place
    document = httpx.get(
        f"{server.url}/openapi.json", headers={"X-API-Key": key}, trust_env=False
    ).json()
    schema = schemathesis.openapi.from_dict(document)
    model = eve.new_model(0)
    sampler = eve.ok(eve.new_sampler(0))["sampling_session_id"]
    known = [ids_of(eve, model, sampler), ids_of(victim.raw, victim.models[0], victim.sampler)]
    found = list(schema.get_all_operations())
    operations = [one.ok() for one in found if isinstance(one, Ok)]
    assert len(operations) == len(found)
    assert len(operations) >= 25
    seen: dict[str, set[int]] = {}
    draw = random.Random(0)
    for operation in operations:
        if operation.path == "/api/v1/forward_backward":
            continue  # its body is bytes; below

        @bounded
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            label = case.operation.label
            if "finish" in label and draw.random() < 0.9:
                put_ids(case, known[1], draw)  # her own session has still to serve
            elif draw.random() < 0.7:
                put_ids(case, draw.choice(known), draw)
            answer = send(server, case, key)
            told(answer, victim)
            seen.setdefault(label, set()).add(answer.status_code)

        ask()
    assert {200, 404, 422} <= set().union(*seen.values()), seen
    # Nothing that she could name of the victim's was hers.
    assert all(victim.raw.poll(f"{m}:0").status_code == 200 for m in victim.models)
    listed = victim.raw.ok(victim.raw.http.get("/checkpoints"))["checkpoints"]
    assert listed == []


def send(server: Server, case: Any, key: str) -> httpx.Response:
    """A made-up case, as it is."""
    made = case.as_transport_kwargs(base_url=server.url, headers={"X-API-Key": key})
    headers = {k: v for k, v in dict(made.get("headers") or {}).items() if isinstance(v, str)}
    headers = {k: v for k, v in headers.items() if v.isascii() and v.isprintable()}
    content = made.get("data")
    if "json" in made:
        content = json.dumps(made["json"]).encode()
        headers["Content-Type"] = "application/json"
    if not isinstance(content, bytes | str | None):
        content = json.dumps(str(content))
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.request(
            made["method"], made["url"], params=made.get("params"), content=content,
            headers={**headers, "X-API-Key": key},
        )  # fmt: skip


# --- protobuf ----------------------------------------------------------------------------------


def mutated(body: bytes, draw: random.Random) -> bytes:
    """A valid body with something wrong somewhere."""
    content = bytearray(body)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(content)) if content else 0
        match draw.randrange(5):
            case 0 if content:
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                del content[at:]
            case 2:
                content[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
            case 3:
                del content[at : at + draw.choice((1, 4, 16))]
            case _:
                content += content[at : at + 64]
    return bytes(content)


def test_mutated_protobuf_bodies(place: tuple[Server, Victim, str], eve: RawClient):
    _, victim, _ = place
    draw, model = random.Random(1), eve.new_model(0)
    accepted: set[str] = set()
    statuses: list[int] = []
    for seq in range(1, 301):
        loss = draw.choice(("cross_entropy", "importance_sampling", "ppo"))
        body = encode(model, seq, random_data(seq, 2, loss), loss)
        answer = eve.http.post(
            "/forward_backward", content=mutated(body, draw), headers={"Content-Type": PROTOBUF}
        )
        told(answer, victim)
        statuses.append(answer.status_code)
        if answer.status_code == 200:
            accepted.add(answer.json()["request_id"])
    assert {200, 400} <= set(statuses), set(statuses)
    assert accepted
    # Once the session is over, what waits for a number that never came is given up.
    eve.ok(eve.post(f"sessions/{eve.session_id}/finish", reason={"type": "success"}))
    for id in accepted:
        eve.result(id)


# --- sequence numbers --------------------------------------------------------------------------


def test_replays_with_altered_bodies_and_any_order_of_numbers(
    place: tuple[Server, Victim, str], eve: RawClient
):
    """The first body of a number counts, whatever comes later, and however often."""
    _, victim, _ = place
    draw = random.Random(2)
    model, twin = eve.new_model(0, seed=3), eve.new_model(1, seed=3)
    numbers = list(range(1, 21))
    draw.shuffle(numbers)
    for seq in numbers:
        first = submit(eve, model, seq, seq)
        assert first.status_code == 200, first.text
        for _ in range(draw.randrange(3)):
            old = draw.choice(numbers[: numbers.index(seq) + 1])
            altered = submit(eve, model, old, draw.choice((old, old + 1000)))
            told(altered, victim)
            assert altered.status_code in (200, 400), altered.text
        eve.poll(f"{model}:{draw.choice(numbers)}") if draw.random() < 0.2 else None
    for seq in range(1, 21):
        eve.ok(submit(eve, twin, seq, seq))
    results = [eve.result(f"{twin}:{seq}") for seq in range(1, 21)]
    for _ in range(2):
        assert [eve.result(f"{model}:{seq}") for seq in range(1, 21)] == results
        for seq in range(1, 21):  # long after their time
            assert submit(eve, model, seq, seq).status_code == 200
            assert submit(eve, model, seq, seq + 1000).status_code == 400


def submit(client: RawClient, model: str, seq: int, content: int) -> httpx.Response:
    if seq % 2:
        return client.forward_backward(model, seq, random_data(content, 2))
    return client.optim_step(model, seq, AdamParams(lr=1e-4 * (1 + content), beta2=0.95))


@pytest.mark.parametrize("seq", [0, -1, 2**31, 2**62, 2**63 - 1, 2**63, 2**70, "1", 1.5, None, [1]])
def test_numbers_beyond_any_sense(place: tuple[Server, Victim, str], eve: RawClient, seq: Any):
    _, victim, _ = place
    model = eve.new_model(0)
    sampler = eve.ok(eve.new_sampler(0))["sampling_session_id"]
    for answer in (
        eve.post("optim_step", model_id=model, seq_id=seq, adam_params={}),
        eve.post("save_weights", model_id=model, seq_id=seq, path="x"),
        eve.sample(sampler, seq, PROMPT),
        eve.post("create_model", session_id=eve.session_id, model_seq_id=seq, base_model="seedling",
                 lora_config={"rank": 1}),
        eve.post("retrieve_future", request_id=f"{model}:{seq}"),
    ):  # fmt: skip
        told(answer, victim)
    assert "error" not in eve.result(eve.ok(eve.optim_step(model, 1, STEP))["request_id"])


# --- others' identifiers -----------------------------------------------------------------------


def test_others_identifiers_in_any_place(place: tuple[Server, Victim, str], eve: RawClient):
    """Wherever an identifier of the victim's stands, beside her own or another of the victim's."""
    _, victim, _ = place
    model = victim.models[0]
    stolen: Sequence[str] = [
        victim.session, model, victim.sampler, f"{model}:0", f"{model}:1", f"{victim.sampler}:0",
        f"tinker://{model}/weights/x",
    ]  # fmt: skip
    routes = (
        "create_model", "load_weights", "get_info", "optim_step", "save_weights",
        "save_weights_for_sampler", "save_weights_external", "create_sampling_session", "asample",
        "retrieve_future", "weights_info", "session_heartbeat",
    )  # fmt: skip
    names = ("model_id", "path", "sampling_session_id", "request_id", "tinker_path", "model_path")
    for route in routes:
        for session in (eve.session_id, victim.session):
            for id in stolen:
                body: dict[str, Any] = dict.fromkeys(names, id) | {
                    "session_id": session, "seq_id": 1, "model_seq_id": 1,
                    "sampling_session_seq_id": 1, "base_model": "seedling", "optimizer": True,
                    "adam_params": {}, "prompt": {"chunks": []}, "lora_config": {"rank": 1},
                }  # fmt: skip
                answer = eve.post(route, **body)
                told(answer, victim)
                if session == eve.session_id and route in ("create_model", "session_heartbeat"):
                    continue  # nothing that is not hers was asked for
                assert 400 <= answer.status_code < 500, (route, id, answer.text)
                assert answer.status_code != 408, (route, id)
