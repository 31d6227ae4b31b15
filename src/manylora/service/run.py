"""`manylora serve` as a process: a socket, uvicorn, the service behind it, signals."""

import asyncio
import ipaddress
import json
import logging
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from manylora.config import ServerFile
from manylora.processes import EngineGroup, start_group
from manylora.service.app import build_app
from manylora.service.auth import DEV_TENANT, KEY_PREFIX
from manylora.service.door import DoorSettings
from manylora.service.ending import CONNECTION_SECONDS, Ending
from manylora.service.engines import keep_up, opening_of
from manylora.service.late import LateHub
from manylora.service.limits import BodyLimits
from manylora.service.metrics import Metrics
from manylora.service.private import keep_private, signing_secret
from manylora.service.server import Service
from manylora.service.wire.limits import WireLimits
from manylora.store import Store
from manylora.store.access import Keys
from manylora.types import ConfigError
from manylora.types.machine import M_ARENA_MAX, set_malloc

log = logging.getLogger("manylora.service")

BACKLOG = 2048
# What the engine's processes may take to end by themselves.
ENGINE_SECONDS = 2.0


class StoreAuthenticator:
    """Keys of the store. While there is none, every `tml-…` key is the development tenant's."""

    def __init__(self, keys: Keys, *, local: bool):
        self._keys = keys
        self._local = local

    def lookup(self, key: str) -> str | None:
        """The tenant of a key, or None."""
        tenant = self._keys.lookup(key)
        if tenant is None and self._local and key.startswith(KEY_PREFIX):
            return None if self._keys.any_keys() else DEV_TENANT
        return tenant


class _Uvicorn(uvicorn.Server):
    """Tells when a signal asks it to stop, and lets no client hold that up."""

    def __init__(self, config: uvicorn.Config, ending: Ending):
        super().__init__(config)
        self.asked_to_stop = asyncio.Event()
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops in order, a second without draining. Unlike uvicorn's own, it is
        not raised again in the end: what is queued has still to be finished and saved."""
        if self.should_exit:
            self.force_exit = True
            self._ending.hurry()
        self.should_exit = True
        self._ending.ask()
        self.asked_to_stop.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is in hand, for a while, and close every connection.

        Uvicorn waits for whoever does not read his answer or does not send the rest of his request,
        and for a connection that came just as it closed the others.
        """
        cutting = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut(self) -> None:
        await asyncio.sleep(CONNECTION_SECONDS)
        self.force_exit = True  # handlers that are still at work are not waited for
        while True:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await asyncio.sleep(0.1)


def run_server(settings: ServerFile) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        ConfigError: the address cannot be used, or it is public and there is no API key.
        BaseModelError, StoreError: what it needs cannot be opened.
    """
    _log_to_stderr()
    # A dozen threads come and go here; with an arena each, memory would grow for hours.
    set_malloc({M_ARENA_MAX: 1})
    keep_private(Path(settings.data_dir))
    store = Store.in_folder(settings.data_dir, settings.database)
    try:
        keyed = store.keys.any_keys()
        if not keyed and not _is_this_machine(settings.host):
            raise ConfigError(
                f"host is {settings.host!r}, which others can reach, and there is no API key; make "
                f"one with: manylora keys create TENANT --data-dir {settings.data_dir}"
            )
        listener = _listen(settings.host, settings.port)
        # First of all, because its processes take seconds to import what they need.
        group = start_group(
            opening_of(settings), step_seconds=settings.step_seconds, ray=settings.ray,
            engine_address=settings.engine_address,
        )  # fmt: skip
    except BaseException:
        store.close()
        raise
    ending = Ending(settings.drain_seconds)
    ending.enforce()
    try:
        with listener:
            return asyncio.run(_serve(settings, store, group, listener, ending, keyed=keyed))
    finally:
        # Nothing is asked of them any more, so there is no reason to wait for long.
        group.close(ENGINE_SECONDS)


async def _serve(
    settings: ServerFile,
    store: Store,
    group: EngineGroup,
    listener: socket.socket,
    ending: Ending,
    *,
    keyed: bool,
) -> int:
    limits = WireLimits(samples=settings.limits.samples, topk=settings.limits.topk)
    metrics = Metrics()
    hub = LateHub()
    service = Service(settings, store, limits, metrics.observe)
    local = _is_this_machine(settings.host)
    app = build_app(
        hub,  # pyrefly: ignore[bad-argument-type]
        authenticator=StoreAuthenticator(store.keys, local=local),
        local_only=not keyed,
        settings=DoorSettings(
            bodies=_body_limits(settings), wire=limits, poll_seconds=settings.long_poll_seconds
        ),
        signing_secret=signing_secret(Path(settings.data_dir)),
        metrics=lambda: metrics.text(service.hub),
    )
    server = _Uvicorn(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            backlog=BACKLOG,
            timeout_keep_alive=75,
            server_header=False,
            proxy_headers=False,
        ),
        ending,
    )
    web = asyncio.create_task(server.serve(sockets=[listener]))
    stop = asyncio.create_task(server.asked_to_stop.wait())
    try:
        announce = partial(_announce, settings, listener, keyed=keyed)
        await keep_up(hub, service, group, stop, announce)
    finally:
        server.should_exit = True
        ending.ask(status=int(not stop.done()))
        hub.close()
        service.wake()
        await asyncio.wait([web])
        await service.stop(ending, group.give_up)
    await web
    return 0


def _announce(settings: ServerFile, listener: socket.socket, *, keyed: bool) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    keys = "" if keyed else "; no API keys yet: any tml-… key of this machine is tenant 'dev'"
    print(f"manylora serves {settings.base} at {url}{keys}", flush=True)


def _body_limits(settings: ServerFile) -> BodyLimits:
    ordinary = BodyLimits()
    largest = settings.limits.body_bytes
    return BodyLimits(
        ordinary=min(ordinary.ordinary, largest),
        by_path={
            path: largest if path.endswith(("forward_backward", "/runs")) else min(limit, largest)
            for path, limit in ordinary.by_path.items()
        },
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only where it sees that it is TCP; otherwise every answer,
    # which is a head and a body, waits 40 ms for the client's word in between.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error.strerror}; give another --port, or 0 for "
            "any free one"
        ) from error
    return listener


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Lines(logging.Formatter):
    """One JSON object a line. What our own loggers write as JSON is not quoted again."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        event = text if record.name == "manylora.access" else json.dumps(text)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = f'"time": "{when}", "level": "{record.levelname}", "logger": "{record.name}"'
        if record.exc_info:
            line += f', "traceback": {json.dumps(self.formatException(record.exc_info))}'
        return f'{{{line}, "event": {event}}}'


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logger = logging.getLogger("manylora")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
