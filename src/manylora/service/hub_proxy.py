"""The hub while it is being made, or made again. No torch here."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from manylora.service.contract import Hub, Outcome, Waiting
from manylora.service.http_errors import NotReady

# How long a request waits for an engine that is still opening.
START_SECONDS = 30.0


class HubProxy:
    """A hub that comes and goes: requests wait a while for it instead of failing."""

    def __init__(self) -> None:
        self._arrival: asyncio.Future[Hub] = asyncio.get_running_loop().create_future()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def arrive(self, hub: Hub) -> None:
        """From now on the hub answers."""
        self._arrival.set_result(hub)

    def depart(self) -> None:
        """From now on requests wait for the next hub; those that the last one has are its own."""
        if self._arrival.done():
            self._arrival = asyncio.get_running_loop().create_future()

    def close(self) -> None:
        """The server stops: nobody need wait for a hub any more."""
        if not self._arrival.done():
            self._arrival.set_exception(NotReady("the server is stopping"))
            self._arrival.exception()  # perhaps nobody waits

    async def settle(self) -> None:
        """Wait until the last hub has answered what it had begun to answer."""
        await self._empty.wait()

    def ready(self) -> bool:
        """Whether the engine answers."""
        there = self._arrival.done() and self._arrival.exception() is None
        return there and self._arrival.result().ready()

    async def outcome(self, *arguments: Any) -> Outcome:
        """A poll is told to come again while there is no engine; see `contract.Hub`."""
        try:
            return await self.__getattr__("outcome")(*arguments)
        except NotReady as error:
            return Waiting("paused_capacity", str(error))

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def when_there(*arguments: Any) -> Any:
            try:
                hub = await asyncio.wait_for(asyncio.shield(self._arrival), START_SECONDS)
            except TimeoutError:
                raise NotReady("the server is opening its base model") from None
            self._inside += 1
            self._empty.clear()
            try:
                return await getattr(hub, name)(*arguments)
            finally:
                self._inside -= 1
                if not self._inside:
                    self._empty.set()

        return when_there
