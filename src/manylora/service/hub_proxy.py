"""A proxy stands for the hub while it is made, or made again. No torch here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from manylora.service.contract import Hub, Outcome, Waiting
from manylora.service.http_errors import NotReady

# How long a request waits for an engine that is still opening.
START_SECONDS = 30.0


class HubProxy:
    """A `HubProxy` is a hub that comes and goes: requests wait for it instead of failing."""

    def __init__(self, hub: Hub | None = None):
        """Answer with `hub` from the beginning; None = requests wait for `arrive`."""
        self._hub = hub
        self._arrival: asyncio.Future[Hub] | None = None
        self._closed = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def arrive(self, hub: Hub) -> None:
        """Let the hub answer from now on."""
        self._hub = hub
        if self._arrival is not None:
            self._arrival.set_result(hub)
            self._arrival = None

    def depart(self) -> None:
        """Have requests wait for the next hub; those that the last one has are its own."""
        self._hub = None

    def close(self) -> None:
        """Let no request wait for a hub any more: the server stops."""
        self._closed = True
        if self._arrival is not None:
            self._arrival.set_exception(NotReady("the server is stopping"))
            self._arrival.exception()  # perhaps none waits any more
            self._arrival = None

    async def settle(self) -> None:
        """Wait until the last hub has answered what it had begun to answer."""
        await self._empty.wait()

    def ready(self) -> bool:
        """Return whether the engine answers."""
        return self._hub is not None and self._hub.ready()

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[Hub]:
        """Give the body the hub, which is not taken away from what runs inside. Raises NotReady:
        none has come in time, or the server stops."""
        hub = await self._next_hub() if self._hub is None else self._hub
        self._inside += 1
        self._empty.clear()
        try:
            yield hub
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        """Return as `contract.Hub` does; a poll is told to come again while there is no engine."""
        try:
            async with self.entered() as hub:
                return await hub.outcome(tenant, request_id, timeout)
        except NotReady as error:
            return Waiting("paused_capacity", str(error))

    async def _next_hub(self) -> Hub:
        if self._closed:
            raise NotReady("the server is stopping")
        if self._arrival is None:
            self._arrival = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(asyncio.shield(self._arrival), START_SECONDS)
        except TimeoutError:
            raise NotReady("the server is opening its base model") from None
