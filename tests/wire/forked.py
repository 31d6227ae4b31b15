"""Servers that start at once: forked off a process that has everything imported already.

What such a server does is what `manylora serve` does from there on; only the imports, seconds of
every start, are done once.
"""

import array
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from io import TextIOWrapper
from types import TracebackType
from typing import Any, Self

from manylora.processes.commands import Assignment
from manylora.processes.launch import main as launch_main
from tests.wire.server import Process, Server, environment


class Nursery:
    """The process that servers are forked off. Not thread-safe; children are killed, not stopped
    by it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.wire.forked", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment(),
        )
        theirs.close()

    def fork(self, words: list[str]) -> "Forked":
        """A new process that runs `manylora words…`."""
        reading, writing = os.pipe()
        ask(self._socket, {"words": words}, writing)
        os.close(writing)
        pid = hear(self._socket)[0]["pid"]
        return Forked(self, pid, os.fdopen(reading, encoding="utf-8", errors="replace"))

    def status(self, pid: int) -> int | None:
        """A child's exit status, if it is gone."""
        ask(self._socket, {"pid": pid})
        return hear(self._socket)[0]["status"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._process.wait(30)


class Forked(Process):
    """A child as `Server` sees its process."""

    def __init__(self, nursery: Nursery, pid: int, stdout: TextIOWrapper) -> None:
        self.pid = pid
        self.stdout = stdout
        self._nursery = nursery
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._nursery.status(self.pid)
        return self._status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < end, f"process {self.pid} does not end"
            time.sleep(0.005)
        return status


class ForkedServer(Server):
    """A server of a nursery."""

    nursery: Nursery

    def _spawn(self, words: list[str]) -> Process:
        return self.nursery.fork(words)


class ForkedLauncher:
    """The launcher of a forked server, itself forked: it has everything imported, too."""

    def __init__(self, assignment: Assignment) -> None:
        reading, self._writing = os.pipe()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(reading, 3)
            os.closerange(4, 1024)  # the server's sockets are not ours
            code = 1
            with suppress(BaseException):
                code = launch_main(assignment, 3)
            os._exit(code)
        os.close(reading)

    def poll(self) -> int | None:
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("launcher", timeout or 0.0)
            time.sleep(0.005)
        return status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def ask(connection: socket.socket, message: Any, *descriptors: int) -> None:
    """Send a message, with descriptors."""
    data = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    connection.sendmsg([len(data).to_bytes(4, "little")], rights if descriptors else [])
    connection.sendall(data)


def hear(connection: socket.socket) -> tuple[Any, list[int]]:
    """A message and its descriptors. Raises EOFError once nobody can ask any more."""
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 4)
    if not size:
        raise EOFError
    data = b""
    while len(data) < int.from_bytes(size, "little"):
        data += connection.recv(int.from_bytes(size, "little") - len(data))
    return json.loads(data), descriptors


def _nurse(connection: socket.socket) -> None:
    import torch

    import manylora.service.serve  # noqa: F401
    from manylora.cli.main import main
    from manylora.models.loading import open_base
    from manylora.processes import group

    assert callable(group.launch_here)  # what a server starts its engine's processes with
    group.launch_here = ForkedLauncher  # type: ignore[assignment]
    # transformers imports a model's classes when they are first asked for. With one thread: a pool
    # of more would not be there in a child, which would wait for it for ever.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    open_base("seedling")
    torch.set_num_threads(threads)
    statuses: dict[int, int] = {}
    while True:
        try:
            message, descriptors = hear(connection)
        except (EOFError, OSError):
            return
        if "words" in message:
            pid = os.fork()
            if pid == 0:
                connection.close()
                for target in (1, 2):
                    os.dup2(descriptors[0], target)
                os.close(descriptors[0])
                sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
                signal.set_wakeup_fd(-1)
                sys.argv = ["manylora", *message["words"]]
                code = 1
                with suppress(BaseException):
                    code = main(message["words"]) or 0
                sys.stdout.flush()
                os._exit(code)
            os.close(descriptors[0])
            ask(connection, {"pid": pid})
            continue
        pid = message["pid"]
        if pid not in statuses:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        ask(connection, {"status": statuses.get(pid)})


if __name__ == "__main__":
    _nurse(socket.socket(fileno=int(sys.argv[1])))
