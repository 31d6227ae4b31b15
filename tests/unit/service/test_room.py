"""What several share: connections, bytes on their way, lines of the log; and the server's names.

Faults that were planted and seen to fail here: the newest closed instead of the longest waiting,
bytes counted after they are held, nothing given back, a kind of lines without its number.
"""

import asyncio
import json
import logging
import resource
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora.service.http.body_limits import BodyLimit, BodyLimits
from manylora.service.http.capacity import Capacity, neighbourhood
from manylora.service.http.connections import OpenConnections, room_for
from manylora.service.http.host_check import Names, host_of
from manylora.service.http_errors import Backpressure
from manylora.service.logs import MOST_ALIKE, SPAN_SECONDS, Sparing
from manylora.types import ConfigError
from tests.unit.service.client import QUICK, Client, application
from tests.unit.service.fake_hub import EXTERNAL, MODEL, FakeHub

# --- connections ------------------------------------------------------------------------------


class Table:
    """Connections, and which of them were closed."""

    def __init__(self, most: int, most_each: int) -> None:
        self.connections = OpenConnections(most, most_each)
        self.closed: list[Any] = []

    def open(self, host: str, port: int) -> bool:
        peer = (host, port)
        if not self.connections.admit(peer):
            return False
        assert self.connections.opened(peer, lambda: self.closed.append(peer)) is not None
        return True

    def works(self, host: str, port: int) -> None:
        line = self.connections.find((host, port))
        assert line is not None
        self.connections.works(line)


def test_the_one_that_has_waited_longest_makes_room():
    table = Table(3, 3)
    assert all(table.open("a", port) for port in (1, 2, 3))
    table.works("a", 1)
    assert table.open("b", 4)
    assert table.closed == [("a", 2)]
    line = table.connections.find(("a", 1))
    assert line is not None
    table.connections.waits(line)  # answered, it is the last in line
    assert table.open("b", 5)
    assert table.closed == [("a", 2), ("a", 3)]
    assert len(table.connections) == 3


def test_an_address_makes_room_for_itself():
    table = Table(10, 2)
    assert all(table.open("a", port) for port in (1, 2, 3))
    assert table.closed == [("a", 1)]
    assert table.open("b", 1)
    for port in (2, 3):
        table.works("a", port)
    assert not table.open("a", 4)  # all of its own are at work
    assert table.open("b", 2)
    assert table.closed == [("a", 1)]


def test_who_works_stays_and_the_address_with_most_waiting_pays():
    table = Table(5, 5)
    for port in (1, 2, 3):
        assert table.open("many", port)
    assert table.open("few", 1)
    table.works("few", 1)
    assert table.open("few", 2)
    assert table.open("new", 1)
    assert table.closed == [("many", 1)]
    for host, port in (("many", 2), ("many", 3), ("few", 2), ("new", 1)):
        table.works(host, port)
    assert not table.open("new", 2)
    assert len(table.connections) == 5
    for host, port in (("many", 2), ("many", 3), ("few", 1), ("few", 2), ("new", 1)):
        line = table.connections.find((host, port))
        assert line is not None
        table.connections.closed(line)
        table.connections.closed(line)  # once is enough
    assert (len(table.connections), table.connections._addresses) == (0, {})


def test_addresses_of_one_network_are_one():
    assert neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:2")
    assert neighbourhood("2001:db8::1") != neighbourhood("2001:db8:0:1::1")
    assert neighbourhood("::ffff:10.0.0.1") == neighbourhood("10.0.0.1") == "10.0.0.1"
    assert neighbourhood("fe80::1%eth0") == "fe80::/64"


def test_connections_leave_descriptors_for_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        wanted = 100
        assert room_for(wanted, 1) == wanted
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= wanted + 100
        most = room_for(10**9, 1)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert limit == before[1] or before[1] == resource.RLIM_INFINITY
        assert most <= limit - 100
        with pytest.raises(ConfigError, match="ulimit -n"):
            room_for(10**9, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- bytes ------------------------------------------------------------------------------------


def test_room_is_counted_in_all_and_for_each():
    room = Capacity(100, 60, "bytes")
    with room.holding("tenant a", "address x") as one:
        one.grow(50)
        one.grow(20)  # it has more than that
        assert room.held == 50
        with room.holding("tenant b", "address x") as other:
            with pytest.raises(Backpressure, match="address x has 50 bytes"):
                other.grow(11)
            assert room.held == 50
            other.grow(10)
        with room.holding("tenant b", "address y") as third:
            third.grow(50)
            with pytest.raises(Backpressure, match="the server has 100 bytes"):
                third.grow(51)
    assert room.held == 0


class Asked:
    """One request to a `BodyLimit` before an application that says how much came."""

    def __init__(self, limits: BodyLimits) -> None:
        self.most_held = 0
        self.middleware = BodyLimit(self._app, limits=limits)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % len(body)})

    async def post(self, parts: Any, headers: Any = ()) -> tuple[int, bytes]:
        scope = {
            "type": "http", "path": "/api/v1/asample", "headers": list(headers),
            "client": ("10.0.0.1", 1), "state": {"tenant": "ann", "request_id": "r"},
        }  # fmt: skip
        said: list[Any] = []

        async def receive() -> Any:
            self.most_held = max(self.most_held, self.middleware.room.held)
            part = await anext(parts, None)
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        async def send(message: Any) -> None:
            said.append(message)

        await self.middleware(scope, receive, send)
        return said[0]["status"], said[1]["body"]


async def pieces(count: int, size: int, seconds: float = 0.0) -> Any:
    for _ in range(count):
        await asyncio.sleep(seconds)
        yield b"x" * size


def test_a_body_is_counted_before_it_is_held():
    limits = BodyLimits(arriving=3000, arriving_each=2000, by_path={"/api/v1/asample": 2500})
    asked = Asked(limits)
    assert asyncio.run(asked.post(pieces(20, 100))) == (200, b"2000")
    assert asked.most_held == 2000
    assert asyncio.run(asked.post(pieces(21, 100)))[0] in (413, 429)
    declared = [(b"content-length", b"1500")]
    assert asyncio.run(both(asked, declared)) == [200, 429]
    assert asked.middleware.room.held == 0


async def both(asked: Asked, declared: Any) -> list[int]:
    """A second body while the first one is on its way: what was declared counts from the start."""
    go_on = asyncio.Event()

    async def slowly() -> Any:
        yield b"x"
        await go_on.wait()
        yield b"x" * 1499

    first = asyncio.create_task(asked.post(slowly(), declared))
    while not asked.middleware.room.held:
        await asyncio.sleep(0)
    second = await asked.post(pieces(15, 100), declared)
    go_on.set()
    return [(await first)[0], second[0]]


def test_a_body_must_come_on():
    limits = BodyLimits(seconds=1.5, bytes_per_second=100)
    asked = Asked(limits)

    async def never() -> Any:
        yield b"x"
        await asyncio.Event().wait()

    status, body = asyncio.run(asked.post(never()))
    assert (status, json.loads(body)["category"]) == (408, "user")
    # One that is slow and long, but comes on, may take longer than that.
    assert asyncio.run(asked.post(pieces(5, 400, 0.4))) == (200, b"2000")
    assert asyncio.run(asked.post(pieces(5, 1, 0.4)))[0] == 408
    assert asked.middleware.room.held == 0


def test_a_tenant_has_so_many_requests_at_once():
    hub = FakeHub()
    settings = type(QUICK)(poll_seconds=0.3, least_poll_seconds=0.3, requests_each=1)
    app = application(hub, settings)
    alice, bob = Client(app), Client(app, "tml-bob")

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            calls = [
                client.post(
                    "/api/v1/retrieve_future", json={"request_id": "waiting"}, headers=one.headers
                )
                for one in (alice, alice, bob)
            ]
            return [answer.status_code for answer in await asyncio.gather(*calls)]

    assert sorted(asyncio.run(ask())) == [404, 408, 429]
    assert alice.post("retrieve_future", {"request_id": "step"}).status_code == 200


# --- the log ----------------------------------------------------------------------------------


def test_lines_of_a_kind_are_few_and_their_number_is_told():
    now = [0.0]
    sparing = Sparing(lambda: now[0])

    def line(message: str, **extra: Any) -> logging.LogRecord:
        record = logging.LogRecord("manylora", logging.ERROR, "f", 1, message, ("x",), None)
        record.__dict__.update(extra)
        return record

    passed = [sparing.filter(line("%s broke")) for _ in range(MOST_ALIKE + 7)]
    assert (sum(passed), passed[0]) == (MOST_ALIKE, True)
    assert sparing.filter(line("%s is another"))
    assert all(sparing.filter(line("%s", like=None)) for _ in range(500))
    now[0] += SPAN_SECONDS
    after = line("%s broke")
    assert sparing.filter(after)
    assert after.__dict__["left_out"] == 7
    kinds = sum(sparing.filter(line("%s", like=number)) for number in range(5000))
    assert kinds < 1000  # kinds that somebody makes up are one kind


# --- names ------------------------------------------------------------------------------------


def test_hosts_as_they_are_written():
    assert host_of("Example.ORG:80") == host_of("example.org.") == "example.org"
    assert host_of("[::1]:8000") == host_of("::1") == "::1"
    names = Names(allowed={"a.org", "*.b.org"})
    assert all(names.allows(host) for host in ("a.org", "x.b.org", "localhost", "127.9.9.9", "::1"))
    assert not any(names.allows(host) for host in ("b.org", "xb.org", "a.org.evil", "", "10.0.0.1"))


@pytest.mark.parametrize(
    ("names", "host", "begins"),
    [
        (Names(public_url="https://lora.example.org/x/"), "evil", "https://lora.example.org/x/api"),
        (Names(), "evil.example", "http://server/api"),
        (Names(allowed={"a.org"}), "a.org:81", "http://a.org:81/api"),
        (Names(), "localhost:9", "http://localhost:9/api"),
    ],
)
def test_addresses_that_are_handed_out_are_the_servers_own(names: Names, host: str, begins: str):
    hub = FakeHub({"a.json": Path(__file__)})
    alice = Client(application(hub, names=names))
    place = f"/api/v1/training_runs/{MODEL}/checkpoints/{EXTERNAL.checkpoint_id}"
    headers = {"host": host, "x-forwarded-host": "evil.example", "x-forwarded-proto": "https"}
    answer = alice.get(f"{place}/external_weights_urls", headers=headers)
    (url,) = answer.json()["urls"].values()
    assert url.startswith(f"{begins}/v1/external_weights/")
