"""`manylora serve` is a process: a socket, uvicorn, the service behind it, signals."""

import asyncio
import logging
import socket
from functools import partial
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import uvicorn

from manylora.config import ServerFile
from manylora.processes import EngineGroup, start_group
from manylora.service.http.app import build_app
from manylora.service.http.auth import DEV_TENANT, KEY_PREFIX
from manylora.service.http.body_limits import BodyLimits
from manylora.service.http.connections import OpenConnections, room_for
from manylora.service.http.context import ContextSettings
from manylora.service.http.host_check import ANY, Names, host_of
from manylora.service.http.listener import BACKLOG, Listener, Protocol, listen_at
from manylora.service.hub_proxy import HubProxy
from manylora.service.logs import log_to_stderr
from manylora.service.private_files import keep_private, signing_secret
from manylora.service.server import Service
from manylora.service.shutdown import CONNECTION_SECONDS, Ending
from manylora.service.state.prometheus import Metrics
from manylora.service.supervision import keep_up
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import Store
from manylora.store.access import Keys
from manylora.types import ConfigError
from manylora.types.host_names import is_loopback
from manylora.types.machine import M_ARENA_MAX, set_malloc
from manylora.types.mesh_shape import MeshShape

log = logging.getLogger("manylora.service")

# What the engine's processes may take to end by themselves.
ENGINE_SECONDS = 2.0


class StoreAuthenticator:
    """The store has the keys. While it has none, each `tml-…` key is the development tenant's."""

    def __init__(self, keys: Keys, *, local: bool):
        self._keys = keys
        self._local = local

    def lookup(self, key: str) -> str | None:
        """Return the tenant of a key, or None."""
        tenant = self._keys.lookup(key)
        if tenant is None and self._local and key.startswith(KEY_PREFIX):
            return None if self._keys.any_keys() else DEV_TENANT
        return tenant


class _Uvicorn(uvicorn.Server):
    """A `_Uvicorn` tells when a signal asks it to stop, and lets no client hold that up."""

    def __init__(self, config: uvicorn.Config, ending: Ending):
        super().__init__(config)
        self.asked_to_stop = asyncio.Event()
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order at the first signal, without draining at a second. Unlike uvicorn's own, it
        is not raised again in the end: what is queued has still to be finished and saved."""
        if self.should_exit:
            self.force_exit = True
            self._ending.hurry()
        self.should_exit = True
        self._ending.ask()
        self.asked_to_stop.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is in hand, for a while, and close every connection.

        Uvicorn waits for a client that does not read its answer or does not send the rest of its
        request, and for a connection that came just as it closed the others.
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
    """Serve until a signal; return the exit code.

    Raises:
        ConfigError: the address cannot be used, or it is public and there is no API key.
        BaseModelError, StoreError: what it needs cannot be opened.
    """
    log_to_stderr()
    # A dozen threads come and go here; with an arena each, memory would grow for hours.
    set_malloc({M_ARENA_MAX: 1})
    keep_private(Path(settings.data_dir))
    store = Store.in_folder(settings.data_dir, settings.database)
    try:
        keyed = store.keys.any_keys()
        if not keyed and not is_loopback(settings.host):
            raise ConfigError(
                f"host is {settings.host!r}, which others can reach, and there is no API key; make "
                f"one with: manylora keys create TENANT --data-dir {settings.data_dir}"
            )
        listener = listen_at(settings.host, settings.port, _connections(settings))
        # First of all, because its processes take seconds to import what they need.
        group = start_group(
            settings.opening(), step_seconds=settings.step_seconds, ray=settings.ray,
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
    listener: Listener,
    ending: Ending,
    *,
    keyed: bool,
) -> int:
    limits = WireLimits(samples=settings.limits.samples, topk=settings.limits.topk)
    metrics = Metrics()
    hub = HubProxy()
    service = Service(settings, store, limits, metrics.observe)
    local, connections = is_loopback(settings.host), listener.connections
    app = build_app(
        hub,
        authenticator=StoreAuthenticator(store.keys, local=local),
        local_only=not keyed,
        settings=_context_settings(settings, limits, connections),
        signing_secret=signing_secret(Path(settings.data_dir)),
        metrics=lambda: metrics.text(service.hub),
        names=_names(settings, keyed=keyed),
        connections=connections,
    )
    server = _Uvicorn(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            # uvicorn takes any callable that makes its protocols.
            http=partial(  # pyrefly: ignore[bad-argument-type]
                Protocol,
                connections=connections,
                head_seconds=settings.connections.head_seconds,
                write_seconds=settings.connections.body_seconds,
            ),
            ws="none",
            backlog=BACKLOG,
            # Seconds of the loop's clock, whole or not.
            timeout_keep_alive=settings.connections.idle_seconds,  # pyrefly: ignore[bad-argument-type]
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


def _connections(settings: ServerFile) -> OpenConnections:
    wanted = settings.connections.most
    most = room_for(wanted, MeshShape.parse(settings.mesh).size)
    if most < wanted:
        log.warning(
            "the system lets this process have so few files open that it takes %d connections at "
            "once instead of %d (connections.most); raise the limit with ulimit -n",
            most,
            wanted,
        )
    return OpenConnections(most, max(1, int(most * settings.connections.share)))


def _names(settings: ServerFile, *, keyed: bool) -> Names:
    allowed = settings.allowed_hosts
    if allowed is None:
        allowed = [ANY] if keyed else []
    url = settings.public_url
    own = [settings.host] if url is None else [settings.host, urlsplit(url).hostname or ""]
    return Names(allowed=frozenset(host_of(name) for name in [*allowed, *own]), public_url=url)


def _context_settings(
    settings: ServerFile, limits: WireLimits, connections: OpenConnections
) -> ContextSettings:
    return ContextSettings(
        bodies=_body_limits(settings), wire=limits, poll_seconds=settings.long_poll_seconds,
        requests_each=connections.most_each, downloads=max(2, connections.most // 16),
    )  # fmt: skip


def _body_limits(settings: ServerFile) -> BodyLimits:
    ordinary = BodyLimits()
    largest, held = settings.limits.body_bytes, settings.connections
    return BodyLimits(
        seconds=held.body_seconds,
        arriving=held.arriving_bytes,
        arriving_each=max(1, int(held.arriving_bytes * held.share)),
        ordinary=min(ordinary.ordinary, largest),
        by_path={
            path: largest if path.endswith(("forward_backward", "/runs")) else min(limit, largest)
            for path, limit in ordinary.by_path.items()
        },
    )
