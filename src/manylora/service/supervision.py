"""An engine stands behind the hub, and another one when it is lost."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from manylora.processes import EngineGroup
from manylora.service.hub_proxy import HubProxy
from manylora.service.server import Service
from manylora.types import EngineLost

log = logging.getLogger("manylora.service")

# An engine that lives shorter than this and completes nothing does not stay up; so many in a row
# are the end.
STEADY_SECONDS, MOST_FAILURES = 30.0, 8


async def keep_up(
    hub: HubProxy,
    service: Service,
    group: EngineGroup,
    stop: "asyncio.Task[Any]",
    announce: Callable[[], None],
) -> None:
    """Keep an engine behind the hub until `stop` is done. Clients see a pause when one is lost.
    Raises BaseModelError, Unsupported: the base cannot be opened; EngineLost: no engine stays
    up."""
    failures, announced = 0, False
    while not stop.done():
        began = asyncio.get_running_loop().time()
        lost = EngineFailure()
        try:
            opening = asyncio.create_task(asyncio.to_thread(group.open, lost.note))
            await asyncio.wait([stop, opening], return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                group.give_up()
            hub.arrive(await service.start(await opening))
        except EngineLost as error:
            lost.note(str(error))
        else:
            if not announced:
                announce()
            announced = True
        waiting = asyncio.create_task(lost.wait())
        await asyncio.wait([stop, waiting], return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            waiting.cancel()
            return
        lived = asyncio.get_running_loop().time() - began
        steady = lived >= STEADY_SECONDS or service.suspects.completed
        failures = 0 if steady else failures + 1
        log.error("the engine was lost: %s\n%s", lost.reason, group.stacks())
        if failures == MOST_FAILURES or not announced:
            raise EngineLost(f"the engine breaks down again and again: {lost.reason}")
        hub.depart()
        service.wake()
        await hub.settle()
        await service.abandon()


class EngineFailure:
    """An `EngineFailure` tells why an engine was lost. Any thread notes it, the loop awaits it."""

    def __init__(self) -> None:
        self.reason = ""
        self._loop = asyncio.get_running_loop()
        self._noted = asyncio.Event()

    def note(self, reason: str) -> None:
        """Note that the engine was lost; the first reason counts."""
        self.reason = self.reason or reason
        self._loop.call_soon_threadsafe(self._noted.set)

    async def wait(self) -> None:
        """Return once the engine was lost."""
        await self._noted.wait()
