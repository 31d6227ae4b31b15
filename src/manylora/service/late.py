"""The hub while it is being made. No torch here: the server listens before that is loaded."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from manylora.service.contract import Hub
from manylora.service.errors import NotReady

# How long a request waits for an engine that is still opening.
START_SECONDS = 30.0


class LateHub:
    """A hub that is still being made: requests wait for it a while instead of failing."""

    def __init__(self) -> None:
        self._arrival: asyncio.Future[Hub] = asyncio.get_running_loop().create_future()

    def arrive(self, hub: Hub) -> None:
        """From now on the hub answers."""
        self._arrival.set_result(hub)

    def ready(self) -> bool:
        """Whether the engine answers."""
        return self._arrival.done() and self._arrival.result().ready()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def when_there(*arguments: Any) -> Any:
            try:
                hub = await asyncio.wait_for(asyncio.shield(self._arrival), START_SECONDS)
            except TimeoutError:
                raise NotReady("the server is still opening its base model") from None
            return await getattr(hub, name)(*arguments)

        return when_there
