"""The processes of one engine as their control process sees them: started, met, replaced.

Each process connects to the control process. Those that were started together make a generation;
when one of them is lost, all of them go, and the launcher starts the next.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from manylora.processes.code import code_digest
from manylora.processes.commands import About, Assignment, Hello, Opening
from manylora.processes.connection import SECRET_BYTES, Connection
from manylora.processes.remote import RemoteEngine
from manylora.types import BaseModelError, ConfigError, EngineLost, ManyloraError

log = logging.getLogger("manylora.processes")

HANDSHAKE_SECONDS = 10.0
STOP_SECONDS = 20.0
# How often a waiting control process looks whether the launcher is still there.
LOOK_SECONDS = 0.5


class Launcher(Protocol):
    """What starts the processes, as `subprocess.Popen` shows it."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def launch(assignment: Assignment) -> Launcher:
    """Start the launcher of this machine. It ends when this process does.

    It has a session of its own, so that Ctrl-C in a terminal reaches the control process alone.
    """
    launcher = subprocess.Popen(
        [sys.executable, "-m", "manylora.processes.launch"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert launcher.stdin is not None
    launcher.stdin.write(assignment.line())
    launcher.stdin.flush()
    return launcher


class EngineGroup:
    """The processes of one engine. Methods belong to one thread unless they say else."""

    def __init__(
        self,
        opening: Opening,
        *,
        step_seconds: float,
        start: Callable[[Assignment], Launcher] = launch,
    ):
        """Start the processes; `open` waits for them.

        Args:
            opening: what they are to open; `stacks` is filled in.
            step_seconds: a command that takes longer is taken for hung.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="manylora-"))
        self._opening = replace(opening, stacks=str(self._folder / "stacks"))
        self._step_seconds = step_seconds
        self._size = opening.mesh.size
        self._generation = -1
        self._waiting: dict[int, dict[int, tuple[Hello, Connection]]] = defaultdict(dict)
        self._changed = threading.Condition()
        self._engine: RemoteEngine | None = None
        secret = secrets.token_bytes(SECRET_BYTES)
        path = self._folder / "engine.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        os.chmod(path, 0o600)
        self._listener.listen(self._size)
        threading.Thread(
            target=self._accept, args=(secret,), name="manylora-meeting", daemon=True
        ).start()
        self._start = start
        self._assignment = Assignment(f"unix:{path}", secret.hex(), self._size, self._opening.base)
        self._launcher = start(self._assignment)

    def open(self, on_lost: Callable[[str], None] = lambda reason: None) -> RemoteEngine:
        """Wait for the next generation and have it open the base.

        Args:
            on_lost: told why, once the engine is lost; any thread.

        Raises:
            ConfigError: other code elsewhere. BaseModelError, Unsupported: the base.
            EngineLost: the processes could not be started, or went while they opened it.
        """
        members = self._next_generation()
        connections = [connection for _, connection in members]

        def lost(reason: str) -> None:
            _kill([hello for hello, _ in members])
            on_lost(reason)

        try:
            _check_code([hello for hello, _ in members])
            about = self._opened(connections)
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        self._engine = RemoteEngine(
            connections, about, step_seconds=self._step_seconds, on_lost=lost
        )
        return self._engine

    def stacks(self) -> str:
        """Where each process stood when a command took too long; empty if none did."""
        texts: list[str] = []
        for number in range(self._size):
            path = Path(f"{self._opening.stacks}.{number}")
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            texts += [f"process {number}:\n{text}"] if text else []
        return "\n".join(texts)

    def close(self) -> None:
        """End the processes, and wait until they are gone."""
        if self._engine is not None:
            self._engine.close()
        with self._changed:
            rest = [one for members in self._waiting.values() for _, one in members.values()]
            self._waiting.clear()
        for connection in rest:
            connection.close()
        self._listener.close()
        if self._engine is None or self._engine.was_lost:
            self._launcher.kill()
        try:
            self._launcher.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the engine's processes did not end; they are killed")
            self._launcher.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- inside ---------------------------------------------------------------------------------

    def _accept(self, secret: bytes) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            try:
                connection = Connection.accepted(sock, secret, HANDSHAKE_SECONDS)
                hello = connection.receive()
            except (OSError, EOFError, ValueError) as error:
                log.warning("a process could not join the engine: %s", error)
                sock.close()
                continue
            if isinstance(hello, Hello):
                with self._changed:
                    self._waiting[hello.generation][hello.world_rank] = (hello, connection)
                    self._changed.notify_all()

    def _next_generation(self) -> list[tuple[Hello, Connection]]:
        with self._changed:
            while True:
                for generation in sorted(self._waiting, reverse=True):
                    members = self._waiting[generation]
                    if generation > self._generation and len(members) == self._size:
                        self._generation = generation
                        self._waiting.clear()
                        return [members[rank] for rank in range(self._size)]
                status = self._launcher.poll()
                if status is not None and self._generation >= 0:
                    log.error("the launcher went (exit status %s); another is started", status)
                    self._generation = -1
                    self._waiting.clear()
                    self._launcher = self._start(self._assignment)
                elif status is not None:
                    raise EngineLost(
                        f"the engine's processes could not be started (exit status {status}); the "
                        "log says why"
                    )
                self._changed.wait(LOOK_SECONDS)

    def _opened(self, connections: list[Connection]) -> About:
        command = {"verb": "open", "arguments": [self._opening]}
        try:
            for connection in connections:
                connection.send(command)
            replies = [connection.receive() for connection in connections]
        except (OSError, EOFError, ValueError) as error:
            raise EngineLost(f"a process of the engine went while it opened: {error}") from error
        for reply in replies:
            if "refusal" in reply:
                refusal: ManyloraError = reply["refusal"]
                raise refusal
            if "fault" in reply:
                raise BaseModelError(
                    f"the base {self._opening.base!r} could not be opened:\n{reply['fault']}"
                )
        abouts: list[About] = [reply["value"] for reply in replies]
        prints = {about.fingerprint for about in abouts}
        if len(prints) > 1:
            raise BaseModelError(
                f"base {self._opening.base!r} is not the same everywhere: the processes found "
                f"{len(prints)} different ones; have every machine read the same files"
            )
        return replace(abouts[0], free_bytes=min(about.free_bytes for about in abouts))


def _check_code(hellos: Sequence[Hello]) -> None:
    """Raises ConfigError: a process runs other code than this one."""
    for hello in hellos:
        if hello.code != code_digest():
            raise ConfigError(
                f"process {hello.world_rank} on {hello.host} runs other code of manylora than this "
                "process does; install the same version everywhere"
            )


def _kill(hellos: Sequence[Hello]) -> None:
    """End processes of this machine that may not be able to end themselves."""
    for hello in hellos:
        if hello.host == socket.gethostname():
            with suppress(ProcessLookupError):
                os.kill(hello.pid, signal.SIGKILL)
