"""Only who knows the secret is heard."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from manylora.processes.connection import Connection, laid_out

SECRET = bytes(range(32))


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    if request.param == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / "s"))
        address = f"unix:{tmp_path / 's'}"
    else:
        sock = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    sock.listen()
    with sock:
        yield sock, address


def meet(
    listener: tuple[socket.socket, str], secret: bytes
) -> tuple[Connection | OSError | EOFError, Connection | OSError | EOFError]:
    """Both ends of a connection, or what kept them from it."""
    ends: list[Connection | OSError | EOFError] = []

    def accept() -> None:
        sock, _ = listener[0].accept()
        try:
            ends.append(Connection.accepted(sock, SECRET, 5.0))
        except (OSError, EOFError) as error:
            sock.close()
            ends.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        ends.insert(0, Connection.made(listener[1], secret, 5.0))
    except (OSError, EOFError) as error:
        ends.insert(0, error)
    thread.join()
    return ends[0], ends[1]


def test_messages_go_both_ways(listener) -> None:
    here, there = meet(listener, SECRET)
    assert isinstance(here, Connection) and isinstance(there, Connection)
    large = np.random.default_rng(0).standard_normal(1 << 18)
    sender = threading.Thread(target=lambda: here.send({"large": large, "list": [1, 2]}))
    sender.start()
    received = there.receive()
    sender.join()
    assert received["large"].tobytes() == large.tobytes()
    there.send_frame(laid_out("thanks"))
    assert here.receive() == "thanks"
    here.close()
    with pytest.raises(EOFError):
        there.receive()
    there.close()


def test_another_secret_is_refused_at_both_ends(listener) -> None:
    here, there = meet(listener, bytes(32))
    assert isinstance(there, ConnectionRefusedError)
    assert isinstance(here, OSError | EOFError)


def test_an_end_that_only_says_yes_is_refused(listener) -> None:
    def pretend() -> None:
        sock, _ = listener[0].accept()
        with sock, suppress(OSError):
            sock.sendall(bytes(32))
            sock.recv(64)
            sock.sendall(bytes(32))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(ConnectionRefusedError, match="does not know"):
        Connection.made(listener[1], SECRET, 5.0)
    thread.join()


def test_a_silent_end_is_not_waited_for(listener) -> None:
    kind = socket.AF_UNIX if listener[1].startswith("unix") else socket.AF_INET
    with socket.socket(kind) as silent:
        silent.connect(listener[0].getsockname())
        sock, _ = listener[0].accept()
        with sock, pytest.raises(OSError, match="timed out"):
            Connection.accepted(sock, SECRET, 0.1)
