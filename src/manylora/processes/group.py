"""A control process starts, meets and replaces the processes of an engine, or of its replicas.

They come from this machine, from a Ray cluster, or from a start that others have made. Each process
connects to the control process. Those that were started together make a generation; when one of
them is lost, all of them go, and the launcher starts the next.
"""

import json
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
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from manylora.processes.code import code_digest
from manylora.processes.commands import About, Assignment, Hello
from manylora.processes.connection import SECRET_BYTES, Connection, answers
from manylora.processes.external_start import Meeting
from manylora.processes.peer_addresses import address_toward, listening_at
from manylora.processes.ray_client import RayClient
from manylora.processes.remote_engine import RemoteEngine
from manylora.types import BaseModelError, ConfigError, EngineLost, ManyloraError, Opening
from manylora.types.files import no_descriptor_left
from manylora.types.mesh_shape import MeshShape

log = logging.getLogger("manylora.processes")

HANDSHAKE_SECONDS = 10.0
STOP_SECONDS = 20.0
# Connections that may be shown the secret's proof at once, beside those of the processes.
STRANGERS = 16
# How often a waiting control process looks whether the launcher is still there.
LOOK_SECONDS = 0.5
# The base that comes with the package.
SEEDLING = "seedling"


class Launcher(Protocol):
    """A launcher starts the processes, and is asked about them as `subprocess.Popen` is."""

    def poll(self) -> int | None:
        """Return the exit status, if it has ended. Raises ConfigError, EngineLost: it said why."""
        ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def launch_here(assignment: Assignment) -> Launcher:
    """Start the launcher of this machine. It ends when this process does.

    It has a session of its own, so that Ctrl-C in a terminal reaches the control process alone, and
    asks for large pages, with which steps on CPU take less time.
    """
    launcher = subprocess.Popen(
        [sys.executable, "-m", "manylora.processes.launch"],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ},
    )
    assert launcher.stdin is not None
    launcher.stdin.write(assignment.line())
    launcher.stdin.flush()
    return launcher


class EngineGroup:
    """A group has the processes of an engine, or of its replicas. Methods belong to one thread
    unless they say otherwise."""

    def __init__(
        self,
        opening: Opening,
        *,
        step_seconds: float,
        start: Callable[[Assignment], Launcher] = launch_here,
        host: str | None = None,
    ):
        """Start the processes; `open` waits for them.

        Args:
            opening: what they are to open.
            step_seconds: a command that takes longer is taken for hung.
            start: starts the processes.
            host: the address of this machine at which processes on others can reach it; without
                one they are all on this machine.

        Raises:
            ConfigError: `host` is not an address of this machine.
        """
        self._opening = opening
        self._near = host is None
        self._step_seconds = step_seconds
        self._size = opening.mesh.size
        self._generation = -1
        self._given_up = False
        self._waiting: dict[int, dict[int, _Met]] = defaultdict(dict)
        self._strangers = threading.BoundedSemaphore(self._size + STRANGERS)
        self._changed = threading.Condition()
        self._engines: tuple[RemoteEngine, ...] = ()
        self._members: list[_Met] = []
        secret = secrets.token_bytes(SECRET_BYTES)
        self._folder = Path(tempfile.mkdtemp(prefix="manylora-"))
        try:
            self._listener, address = _listen(self._folder, host)
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        self._listener.listen(self._size + STRANGERS)
        threading.Thread(
            target=self._accept, args=(secret,), name="manylora-meeting", daemon=True
        ).start()
        self._start = start
        self._assignment = Assignment(
            address, secret.hex(), self._size, opening.base, opening.device, opening.mesh.tp
        )
        self._launcher = start(self._assignment)

    def open(
        self, on_lost: Callable[[str], None] = lambda reason: None
    ) -> tuple[RemoteEngine, ...]:
        """Wait for the next generation and have it open the base.

        Args:
            on_lost: told why, once an engine is lost, and all others with it; any thread.

        Returns:
            An engine for each replica.

        Raises:
            ConfigError: other code elsewhere, or processes that cannot reach this one.
            BaseModelError, Unsupported: the base.
            EngineLost: the processes could not be started, or went while they opened it.
        """
        members = self._next_generation()
        connections = [connection for _, connection in members]

        def lost(reason: str) -> None:
            self._kill(members)
            for engine in engines:
                if engine.lost is None:
                    engine.lose(reason)
            on_lost(reason)

        try:
            _check_code(members)
            about = self._opened(members)
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        size = self._opening.mesh.one.size
        engines = self._engines = tuple(
            RemoteEngine(
                connections[first : first + size],
                about,
                step_seconds=self._step_seconds,
                on_lost=lost,
            )
            for first in range(0, self._size, size)
        )
        return engines

    def give_up(self) -> None:
        """Have a waiting `open`, and all that an engine is asked or was, raise EngineLost; any
        thread may call it. The processes end, in the midst of what they do."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
            members = self._members
        for engine in self._engines:
            if engine.lost is None:
                engine.lose("nobody waits for the engine's processes any more")
        for _, connection in members:
            connection.hang_up()
        self._kill(members)

    def stacks(self) -> str:
        """Return where processes stood that took too long or broke down; empty if none did."""
        return "\n".join(engine.stacks for engine in self._engines if engine.stacks)

    def close(self, seconds: float = STOP_SECONDS) -> None:
        """End the processes, which may take so long to end by themselves, and wait for that."""
        for engine in self._engines:
            engine.close()
        with self._changed:
            rest = [one for members in self._waiting.values() for _, one in members.values()]
            self._waiting.clear()
        for connection in rest:
            connection.close()
        self._listener.close()
        if not self._engines or any(engine.was_lost for engine in self._engines):
            self._launcher.kill()
        try:
            self._launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("the engine's processes did not end by themselves; they are killed")
            self._launcher.kill()
            self._kill(self._members)
            with suppress(subprocess.TimeoutExpired):
                self._launcher.wait(seconds)
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- inside ---------------------------------------------------------------------------------

    def _accept(self, secret: bytes) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not no_descriptor_left(error):
                    return
                time.sleep(LOOK_SECONDS)
                continue
            self._strangers.acquire()  # one that says nothing must not keep the others out
            threading.Thread(target=self._meet, args=(sock, secret), daemon=True).start()

    def _meet(self, sock: socket.socket, secret: bytes) -> None:
        try:
            connection = Connection.accepted(sock, secret, HANDSHAKE_SECONDS)
            hello = connection.receive(HANDSHAKE_SECONDS)
        except (OSError, EOFError, ValueError) as error:
            log.warning("a process could not join the engine: %s", error)
            sock.close()
            return
        finally:
            self._strangers.release()
        if isinstance(hello, Hello):
            with self._changed:
                self._waiting[hello.generation][hello.world_rank] = (hello, connection)
                self._changed.notify_all()

    def _next_generation(self) -> "list[_Met]":
        with self._changed:
            while True:
                if self._given_up:
                    raise EngineLost("nobody waits for the engine's processes any more")
                for generation in sorted(self._waiting, reverse=True):
                    members = self._waiting[generation]
                    if generation > self._generation and len(members) == self._size:
                        self._generation = generation
                        self._waiting.clear()
                        self._members = [members[rank] for rank in range(self._size)]
                        return self._members
                status = self._launcher_status()
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

    def _launcher_status(self) -> int | None:
        """Return the launcher's exit status if it ended. Raises what it said, if none of its
        processes has ever been met."""
        try:
            return self._launcher.poll()
        except (ConfigError, EngineLost) as error:
            if self._generation < 0:
                raise
            log.error("%s", error)
            return 1

    def _opened(self, members: "Sequence[_Met]") -> About:
        command = {"verb": "open", "arguments": [self._opening]}
        connections = [connection for _, connection in members]
        try:
            for connection in connections:
                connection.send(command)
            replies = answers(connections, lambda reply: "value" not in reply)
        except (OSError, EOFError, ValueError) as error:
            raise EngineLost(f"a process of the engine went while it opened: {error}") from error
        for rank, reply in replies.items():
            where = _elsewhere(members[rank][0])
            if "refusal" in reply:
                refusal: ManyloraError = reply["refusal"]
                raise type(refusal)(f"{where}{refusal}")
            if "fault" in reply:
                words = f"{where}the base {self._opening.base!r} could not be opened"
                # Of several, it may have been another that went.
                kind = BaseModelError if self._size == 1 else EngineLost
                raise kind(f"{words}:\n{reply['fault']}")
        abouts: list[About] = [replies[rank]["value"] for rank in range(self._size)]
        prints = {about.fingerprint for about in abouts}
        if len(prints) > 1:
            raise BaseModelError(
                f"base {self._opening.base!r} is not the same everywhere: the processes found "
                f"{len(prints)} different ones; have every machine read the same files"
            )
        return replace(abouts[0], free_bytes=min(about.free_bytes for about in abouts))

    def _kill(self, members: "Sequence[_Met]") -> None:
        """End processes, if they are on this machine, that may not be able to end themselves."""
        for hello, _ in members if self._near else ():
            with suppress(ProcessLookupError):
                os.kill(hello.pid, signal.SIGKILL)


def start_group(
    opening: Opening,
    *,
    step_seconds: float,
    ray: str | None = None,
    engine_address: str | None = None,
    meeting: Meeting | None = None,
) -> EngineGroup:
    """Start the processes of an engine.

    Args:
        opening: what they are to open.
        step_seconds: a command that takes longer is taken for hung.
        ray: the address of the cluster whose devices they are to use: `auto` or HOST:PORT; None =
            this machine's.
        engine_address: with Ray, the address of this machine at which they can reach it; None = the
            one on the route toward them.
        meeting: where they meet if they were started already.

    Raises:
        ConfigError: there is no such cluster, or `engine_address` is not one of this machine.
        Unsupported: the base's config says that this mesh cannot split it.
    """
    check_split(opening.base, opening.mesh)
    if meeting is not None:
        return EngineGroup(opening, step_seconds=step_seconds, start=meeting, host=meeting.host)
    if ray is None:
        return EngineGroup(opening, step_seconds=step_seconds, start=launch_here)
    launcher = RayClient(ray)
    try:
        host = address_toward(launcher.peer())
        base = Path(opening.base)
        return EngineGroup(
            # Ray's processes have another working directory.
            replace(opening, base=str(base.absolute())) if base.is_dir() else opening,
            step_seconds=step_seconds,
            start=launcher,
            host=engine_address or host,
        )
    except BaseException:
        launcher.kill()
        raise


def check_split(base: str, mesh: MeshShape) -> None:
    """Refuse (as Unsupported) a `tp` that a base's config.json rules out, before a process is
    started or a weight read. A base that is not on this machine, or has no such file, is left to
    those that open it."""
    folder = Path(__file__).parents[1] / "models" / base if base == SEEDLING else Path(base)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config")
    except (OSError, ValueError, AttributeError):
        return
    mesh.check_split({**config, **text} if isinstance(text, dict) else config, repr(base))


_Met = tuple[Hello, Connection]


def _listen(folder: Path, host: str | None) -> tuple[socket.socket, str]:
    """Return a socket for the processes, and its address as `Connection.made` takes it."""
    if host is None:
        path = folder / "engine.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        os.chmod(path, 0o600)
        return listener, f"unix:{path}"
    try:
        return listening_at(host)
    except OSError as error:
        raise ConfigError(
            f"engine_address: {host} cannot be listened on: {error.strerror}; it has to be an "
            "address of this machine that the machines of the engine can reach"
        ) from error


def _elsewhere(hello: Hello) -> str:
    """Return which process said it, if it is on another machine."""
    if hello.host == socket.gethostname():
        return ""
    return f"process {hello.world_rank} on {hello.host}: "


def _check_code(members: Sequence[_Met]) -> None:
    """Raise ConfigError if a process runs other code than this one."""
    for hello, _ in members:
        if hello.code != code_digest():
            raise ConfigError(
                f"process {hello.world_rank} on {hello.host} runs other code of manylora than this "
                "process does; install the same version everywhere"
            )
