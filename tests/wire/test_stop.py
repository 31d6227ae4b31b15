"""A stop is over in time whatever clients do, on a machine that is busy; and nothing is lost by it.

Eight processes turn idle loops beside each server.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from manylora.types import AdamParams
from tests.family import engine_processes, runs
from tests.wire.data import FIRST_PLAIN_TOKEN, assert_same_bits, outputs, random_data
from tests.wire.forked import ForkedServer
from tests.wire.raw import LONG_POLL_SECONDS, PROTOBUF, RawClient, encode
from tests.wire.server import DEVELOPER

pytestmark = pytest.mark.usefixtures("nursery", "busy")

DRAIN_SECONDS = 2.0
BEYOND_SECONDS = 10.0
OPTIONS = ("--set", f"drain_seconds={DRAIN_SECONDS}")
# States are written by the stop alone.
PATIENT = (
    *("--set", "drain_seconds=15", "--set", "saving.every_seconds=100000"),
    *("--set", "saving.every_steps=100000"),
)
BUSY = 8
STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 3)

Guest = Callable[[ForkedServer, ExitStack], None]


@pytest.fixture(scope="module")
def busy() -> Iterator[None]:
    """Others want the cores, too."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


def stop_in_time(server: ForkedServer, drain_seconds: float = DRAIN_SECONDS) -> None:
    began = time.monotonic()
    assert server.stop() == 0, "".join(server.log[-40:])
    seconds = time.monotonic() - began
    assert seconds < drain_seconds + BEYOND_SECONDS, "".join(server.log[-40:])


# --- clients that a server could wait for ---------------------------------------------------------


def connected(server: ForkedServer, stack: ExitStack, data: bytes, room: int = 0) -> socket.socket:
    """A connection on which `data` were sent; it is given up only after the test."""
    sock = stack.enter_context(socket.socket())
    if room:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(data)
    return sock


def request(method: str, path: str, length: int, *lines: str) -> bytes:
    head = [
        f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {DEVELOPER}",
        f"Content-Length: {length}", *lines,
    ]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode()


def says_nothing(server: ForkedServer, stack: ExitStack) -> None:
    connected(server, stack, b"")


def half_a_header(server: ForkedServer, stack: ExitStack) -> None:
    connected(server, stack, b"POST /api/v1/asample HTTP/1.1\r\nHost: 127")


def half_a_body(server: ForkedServer, stack: ExitStack) -> None:
    kind = f"Content-Type: {PROTOBUF}"
    head = request("POST", "/api/v1/forward_backward", 100_000, kind)
    connected(server, stack, head + bytes(50_000))


def never_reads(server: ForkedServer, stack: ExitStack) -> None:
    """More answers than the kernel keeps for it."""
    ask = request("GET", "/openapi.json", 0)
    sock = connected(server, stack, ask * 400, room=4096)
    sock.setblocking(False)


def polls_for_ever(server: ForkedServer, stack: ExitStack) -> None:
    """What it polls for waits for an operation that does not come."""
    raw = RawClient(server)
    raw.open_session()
    model = raw.new_model()
    early = [seq for seq in range(2, 6) if raw.ok(raw.forward_backward(model, seq, PROBE))]

    def poll(seq: int, http: httpx.Client) -> None:
        poll = {"request_id": f"{model}:{seq}"}
        http.post(f"{server.url}/api/v1/retrieve_future", json=poll)

    for seq in early:
        again_and_again(stack, partial(poll, seq))


def asks_again_and_again(server: ForkedServer, stack: ExitStack) -> None:
    """Keeps its connection as long as it can, submits, polls for it, and comes back."""
    raw = RawClient(server)
    raw.open_session()
    model = raw.new_model()

    numbers = itertools.count(1)

    def ask(http: httpx.Client) -> None:
        seq = next(numbers)
        http.post(
            f"{server.url}/api/v1/forward_backward", content=encode(model, seq, PROBE),
            headers={"Content-Type": PROTOBUF},
        )  # fmt: skip
        poll = {"request_id": f"{model}:{seq}"}
        http.post(f"{server.url}/api/v1/retrieve_future", json=poll)

    for _ in range(2):
        again_and_again(stack, ask)


def wants_a_long_answer(server: ForkedServer, stack: ExitStack) -> None:
    """Hundreds of tokens, many times over: more than the drain lasts."""
    raw = RawClient(server)
    raw.open_session()
    sampler = raw.ok(raw.new_sampler())["sampling_session_id"]
    long = {"max_tokens": 500, "stop": [0]}
    raw.ok(raw.sample(sampler, 0, [FIRST_PLAIN_TOKEN], num_samples=64, params=long))


def again_and_again(stack: ExitStack, act: Callable[[httpx.Client], None]) -> None:
    """On a thread, over one connection as long as there is one, until the test is over."""
    over = threading.Event()

    def loop() -> None:
        with httpx.Client(
            trust_env=False, timeout=LONG_POLL_SECONDS, headers={"X-API-Key": DEVELOPER}
        ) as http:
            while not over.is_set():
                with suppress(httpx.TransportError):
                    act(http)

    thread = threading.Thread(target=loop)
    thread.start()
    stack.callback(thread.join)
    stack.callback(over.set)


GUESTS: dict[str, Guest] = {
    guest.__name__: guest
    for guest in (
        says_nothing, half_a_header, half_a_body, never_reads, polls_for_ever,
        asks_again_and_again, wants_a_long_answer,
    )
}  # fmt: skip


class Learner:
    """A well-behaved client."""

    def __init__(self, server: ForkedServer) -> None:
        self.raw = RawClient(server)
        self.raw.open_session()
        self.model = self.raw.new_model(seed=3)

    def submit(self, *pairs: int) -> None:
        for pair in pairs:
            self.raw.ok(self.raw.forward_backward(self.model, 2 * pair + 1, random_data(pair, 3)))
            self.raw.ok(self.raw.optim_step(self.model, 2 * pair + 2, STEP))

    def probe(self, pairs: int) -> list[np.ndarray]:
        """After so many pairs."""
        for seq in range(1, 2 * pairs + 1):
            answer: Any = self.raw.result(f"{self.model}:{seq}")
            assert isinstance(answer, bytes) or "error" not in answer, answer
        submitted = self.raw.forward_backward(self.model, 2 * pairs + 1, PROBE, forward_only=True)
        return outputs(self.raw.losses(self.raw.ok(submitted)["request_id"]))


def stop_with(
    server: ForkedServer, *guests: Guest, drain_seconds: float = DRAIN_SECONDS
) -> Learner:
    """Stop it while it has these guests, and a learner who has just submitted three steps."""
    with ExitStack() as stack:
        learner = Learner(server)
        for guest in guests:
            guest(server, stack)
        learner.submit(0, 1, 2)
        stop_in_time(server, drain_seconds)
    return learner


def stops_and_loses_nothing(folder: Path, *guests: Guest) -> None:
    with ForkedServer(folder / "calm") as calm:
        learner = Learner(calm)
        learner.submit(0, 1, 2, 3)
        expected = learner.probe(4)
    with ForkedServer(folder / "shaken", *OPTIONS) as server:
        engine = engine_processes(server.pid)
        learner = stop_with(server, *guests)
        assert not any(runs(pid) for pid in engine)
        server.start()
        learner.submit(3)
        assert_same_bits(learner.probe(4), expected)
        server.kill()


def test_all_of_them_at_once(tmp_path: Path) -> None:
    stops_and_loses_nothing(tmp_path, *GUESTS.values())


@pytest.mark.slow
@pytest.mark.parametrize("guest", GUESTS)
def test_each_of_them(tmp_path: Path, guest: str) -> None:
    stops_and_loses_nothing(tmp_path, GUESTS[guest])


def test_what_there_is_time_for_is_saved(tmp_path: Path) -> None:
    """Clients that only hold connections take nothing of the drain: nothing is done again."""
    holding = (says_nothing, half_a_header, half_a_body, never_reads)
    with ForkedServer(tmp_path, *PATIENT) as server:
        stop_with(server, *holding, drain_seconds=15.0)
        seen = len(server.log)
        server.start()
        assert not any("of the last server go on" in line for line in server.log[seen:])
        server.kill()


def test_while_the_base_is_being_opened(tmp_path: Path) -> None:
    """Requests that wait for the engine are let go."""
    with ForkedServer(tmp_path, *OPTIONS) as server:
        server.kill()
        server.launch()
        with ExitStack() as stack:
            asking = request("POST", "/api/v1/create_session", 0)
            while not listens_to(server, stack, asking):
                time.sleep(0.02)
            stop_in_time(server)


def listens_to(server: ForkedServer, stack: ExitStack, data: bytes) -> bool:
    """Whether it listens, and was sent `data`."""
    with suppress(ConnectionError):
        connected(server, stack, data)
        return True
    return False


def test_an_engine_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    """Its states cannot be saved; the journal has what they stand for."""
    with ForkedServer(tmp_path / "calm") as calm:
        learner = Learner(calm)
        learner.submit(0, 1, 2)
        expected = learner.probe(3)
    with ForkedServer(tmp_path / "shaken", *OPTIONS) as server:
        learner = Learner(server)
        learner.submit(0)
        for pid in engine_processes(server.pid):
            os.kill(pid, signal.SIGSTOP)
        learner.submit(1, 2)
        stop_in_time(server)
        server.start()
        assert_same_bits(learner.probe(3), expected)
        server.kill()
