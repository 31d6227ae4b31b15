"""Only who knows the secret is heard."""

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.processes.connection import Connection, Ended, answers, laid_out

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


def several(listener: tuple[socket.socket, str], count: int) -> tuple[list[Any], list[Any]]:
    pairs = [meet(listener, SECRET) for _ in range(count)]
    return [here for here, _ in pairs], [there for _, there in pairs]


def never(message: Any) -> bool:
    return False


def test_answers_are_told_by_their_place(listener) -> None:
    members, control = several(listener, 3)
    for number in (2, 0, 1):
        members[number].send(f"answer {number}")
    assert answers(control, never) == {0: "answer 0", 1: "answer 1", 2: "answer 2"}


def is_enough(message: Any) -> bool:
    return message == "enough"


def test_an_answer_that_ends_the_waiting_is_not_waited_beyond(listener) -> None:
    members, control = several(listener, 2)
    members[1].send("enough")
    assert answers(control, is_enough) == {1: "enough"}


def test_what_fails_because_another_is_gone_is_not_to_blame(listener) -> None:
    members, control = several(listener, 2)
    members[1].send("enough")
    closing = threading.Timer(0.05, members[0].close)
    closing.start()
    with pytest.raises((EOFError, ConnectionError)):
        answers(control, is_enough)
    closing.join()


def test_where_a_process_stood_comes_through_its_connection(listener) -> None:
    """Of all that say it, also if another has gone before."""
    members, control = several(listener, 4)
    members[3].send("done")
    members[0].close()
    for number in (1, 2):
        socket.socket.sendall(members[number]._socket, f"Timeout (0:00:0{number})!\n".encode())
        members[number].close()
    with pytest.raises(Ended, match="too long") as caught:
        answers(control, never)
    assert caught.value.stacks == (
        "process 1:\nTimeout (0:00:01)!\n\nprocess 2:\nTimeout (0:00:02)!\n"
    )


def test_one_that_breaks_down_says_so(listener) -> None:
    [member], control = several(listener, 1)
    socket.socket.sendall(member._socket, b"Fatal Python error: Segmentation fault\n")
    member.close()
    with pytest.raises(Ended, match="broke down") as caught:
        answers(control, never)
    assert "Segmentation fault" in caught.value.stacks


def test_one_that_goes_ends_the_waiting_for_the_others(listener) -> None:
    members, control = several(listener, 2)
    members[1].close()
    with pytest.raises((EOFError, OSError)):
        answers(control, never)
    members, control = several(listener, 2)
    members[0].send(1)
    with pytest.raises(TimeoutError):
        answers(control, never, 0.1)


def test_answers_come_where_no_descriptor_is_left(listener) -> None:
    """An engine is not lost because this process has all the files open that it may."""
    control, member = meet(listener, SECRET)
    assert isinstance(control, Connection) and isinstance(member, Connection)
    member.send({"value": 1})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        assert answers([control], lambda reply: False, 30.0) == {0: {"value": 1}}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    control.close()
    member.close()
