"""Clients that only hold things: connections, heads, bodies, answers. Real sockets, and a server
that may have two hundred files open.

Faults that were planted and seen to fail here: no connection closed for a newcomer, no deadline for
heads, none for bodies, bytes not counted, the socket closed behind a refusal, any Host answered.
"""

import json
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from tests.wire.raw import RawClient
from tests.wire.server import DEVELOPER, Server, create_key

FILES = 200
MIB = 1 << 20
SETTINGS = (
    "connections.head_seconds=2", "connections.body_seconds=3",
    "connections.arriving_bytes=16777216",
)  # fmt: skip
# Far more than anything here takes; what hangs, hangs.
SECONDS = 60.0


class Narrow(Server):
    """A server whose process may have few files open."""

    def launch(self) -> threading.Event:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, before[1]))
        try:
            found = super().launch()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        return found


def options() -> list[str]:
    return [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    folder = tmp_path_factory.mktemp("edge-keyed")
    ann, eve = create_key(folder, "ann"), create_key(folder, "eve")
    with Narrow(folder, *options()) as server:
        yield server, ann, eve
        assert server.stop() == 0


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Narrow(tmp_path_factory.mktemp("edge-keyless"), *options()) as server:
        yield server
        assert server.stop() == 0


@contextmanager
def lines(server: Server, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """So many connections on which so much was sent."""
    with ExitStack() as stack:
        yield [stack.enter_context(line(server, sent)) for _ in range(count)]


@contextmanager
def line(server: Server, sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock:
        try:
            sock.sendall(sent)
        except OSError:  # the server was faster
            assert sent
        yield sock


def head(method: str, path: str, *headers: str, host: str = "127.0.0.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode()


def post(path: str, key: str, length: int, kind: str = "application/json") -> bytes:
    return head(
        "POST", f"/api/v1/{path}", f"X-API-Key: {key}", f"Content-Type: {kind}",
        f"Content-Length: {length}",
    )  # fmt: skip


def answer(sock: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of what comes, to the end of its body."""
    with sock.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, json.loads(file.read(int(headers["content-length"])))


def is_closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    return True


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def log_bytes(server: Server) -> int:
    return sum(len(one) for one in server.log)


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def is_served(server: Server, key: str) -> None:
    """A newcomer opens a session and gets a result."""
    client = RawClient(server, key)
    client.open_session()
    client.new_model(0, rank=1)
    client.close()


# --- connections and heads -------------------------------------------------------------------


HALF = b"POST /api/v1/create_session HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API"


@pytest.mark.parametrize("sent", [HALF, b"", b"GET"], ids=["half a head", "nothing", "a word"])
def test_those_who_only_hold_connections_keep_nobody_out(
    keyed: tuple[Server, str, str], keyless: Server, sent: bytes
):
    for server, key in ((keyed[0], keyed[1]), (keyless, DEVELOPER)):
        before = log_bytes(server)
        for _ in range(2):  # they come again as soon as they are sent away
            with lines(server, 260, sent):
                is_served(server, key)
                assert descriptors(server) < FILES - 20
        assert log_bytes(server) - before < 20_000
        until(lambda server=server: descriptors(server) < 60)
        is_served(server, key)
        assert not [one for one in server.log if "raceback" in one or "engine was lost" in one]


def test_a_head_has_a_time(keyless: Server):
    with line(keyless, HALF) as half, line(keyless, b"") as silent:
        status, headers, body = answer(half)
        assert (status, headers["connection"]) == (408, "close")
        assert body.keys() == {"error", "category", "request_id"}
        assert is_closed(half)
        assert is_closed(silent)
    with line(keyless, head("GET", "/healthz")) as again:  # and so has the next one on a line
        assert answer(again)[0] == 200
        again.sendall(HALF)
        assert answer(again)[0] == 408


def test_garbage_is_told_so_and_fills_no_log(keyless: Server):
    before = log_bytes(keyless)
    for _ in range(300):
        with line(keyless, b"\x16\x03\x01\x02\x00 hello\r\n\r\n") as sock:
            status, _, body = answer(sock)
            assert (status, body["category"]) == (400, "user")
    assert log_bytes(keyless) - before < 20_000


def test_a_client_that_reads_nothing_is_sent_away(keyed: tuple[Server, str, str]):
    server, ann, _ = keyed
    asked = head("GET", "/openapi.json", f"X-API-Key: {ann}")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.settimeout(0.2)
        try:
            while True:  # until nothing more is taken: answers wait behind it
                sock.send(asked * 10)
        except OSError:
            pass
        gone = select.poll()
        gone.register(sock, select.POLLHUP | select.POLLERR)
        until(lambda: bool(gone.poll(100)))
    is_served(server, ann)


# --- bodies ----------------------------------------------------------------------------------


def test_a_body_that_does_not_come_on_is_given_up(keyed: tuple[Server, str, str]):
    server, ann, _ = keyed
    with line(server, post("create_session", ann, 20) + b"{") as sock:
        status, headers, body = answer(sock)
        assert (status, headers["connection"], body["category"]) == (408, "close", "user")
        assert is_closed(sock)
    is_served(server, ann)


def test_bytes_on_their_way_are_counted_before_they_are_held(keyed: tuple[Server, str, str]):
    """Half of what the server holds is one tenant's, and one address's, at most."""
    server, ann, eve = keyed
    kind, size = "application/x-protobuf", 5 * MIB
    with line(server, post("forward_backward", eve, size, kind) + b"\0" * (size - 1)) as first:
        with line(server, post("forward_backward", eve, size, kind)) as second:
            status, headers, body = answer(second)
            assert (status, headers["retry-after"], body["category"]) == (429, "1", "server")
            assert "8,388,608" in body["error"]
        is_served(server, ann)  # small ones find room
        assert answer(first)[0] == 408
    with line(server, post("forward_backward", eve, size, kind) + b"\xff" * size) as third:
        assert answer(third)[0] == 400  # all of it came, and is no protobuf
    with line(server, post("forward_backward", eve, 9 * MIB, kind)) as never:
        assert answer(never)[0] == 413  # could never be held


def test_what_needs_no_key_takes_no_body(keyed: tuple[Server, str, str]):
    server, _, _ = keyed
    for path in ("/healthz", "/readyz", "/openapi.json", "/api/v1/healthz"):
        with line(server, head("GET", path, "Content-Length: 1000000") + b"\0" * 1000) as sock:
            assert answer(sock)[0] == 413, path
    with line(server, post("create_session", "tml-nobody", 100 * MIB) + b"\0" * MIB) as sock:
        status, headers, _ = answer(sock)
        assert (status, headers["connection"]) == (401, "close")


@pytest.mark.parametrize("declared", [1 << 30, 3 * MIB], ids=["a part of it", "all of it"])
def test_who_writes_first_learns_that_it_is_too_much(keyed: tuple[Server, str, str], declared: int):
    server, ann, _ = keyed
    with line(server, post("create_session", ann, declared)) as sock:
        for _ in range(min(declared, 48 * MIB) // MIB):
            sock.sendall(b"\0" * MIB)  # raises if the server breaks the connection
        status, _, body = answer(sock)
        assert (status, "1048576 bytes" in body["error"]) == (413, True)
        sock.sendall(b"\0" if declared == 1 << 30 else b"")
    is_served(server, ann)


def test_a_refusal_does_not_wait_for_the_body(keyed: tuple[Server, str, str]):
    server, ann, _ = keyed
    with line(server, post("create_session", ann, 1 << 30) + b"\0" * 5000) as sock:
        assert answer(sock)[0] == 413
        assert is_closed(sock)  # it does not wait for the rest for ever
    expecting = post("create_session", "tml-nobody", 1 << 30).replace(
        b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"
    )
    with line(server, expecting) as sock:
        assert answer(sock)[0] == 401
        assert is_closed(sock)


# --- hosts and framing -----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:80"])
def test_without_keys_only_this_machines_names_are_answered(keyless: Server, host: str):
    for asked in (head("GET", "/metrics", host=host), head("GET", "/healthz", host=host)):
        with line(keyless, asked) as sock:
            status, _, body = answer(sock)
            assert (status, "allowed_hosts" in body["error"]) == (400, True)


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "127.0.0.1", "127.1.2.3:8", "[::1]"])
def test_this_machines_names_are(keyless: Server, host: str):
    with line(keyless, head("GET", "/healthz", host=host)) as sock:
        assert answer(sock)[0] == 200


def test_who_speaks_for_another_is_not_of_this_machine(keyless: Server):
    with httpx.Client(base_url=keyless.url, trust_env=False) as client:
        assert client.get("/metrics").status_code == 200
        for name in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
            assert client.get("/metrics", headers={name: "x"}).status_code == 401, name
            headers = {name: "x", "X-API-Key": DEVELOPER}
            assert client.get("/api/v1/checkpoints", headers=headers).status_code == 401, name


def test_two_ways_to_end_a_body_are_refused(keyed: tuple[Server, str, str]):
    server, ann, _ = keyed
    hidden = head("GET", "/healthz")
    both = post("create_session", ann, len(hidden) + 5).replace(
        b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with line(server, both + b"0\r\n\r\n" + hidden) as sock:
        assert answer(sock)[0] == 400
        assert is_closed(sock)  # what follows is not taken for a request
