"""A running service works over one data directory; this is how it starts and how it stops."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from manylora.config import ServerFile
from manylora.hosting import Host
from manylora.hosting.engine_protocol import EngineProtocol
from manylora.journal import Journal
from manylora.scheduler import BatchReport
from manylora.service.shutdown import Ending
from manylora.service.state.crash_suspects import CrashSuspects
from manylora.service.state.hub import TinkerHub
from manylora.service.state.maintenance import SECONDS_OF_AN_HOUR, Maintenance
from manylora.service.state.promises import Promises
from manylora.service.state.replay import Replay
from manylora.service.state.resources import Resources
from manylora.service.state.result_files import Results
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import Store
from manylora.types import SaveFailed
from manylora.types.files import no_descriptor_left

log = logging.getLogger("manylora.service")

# Results that are kept in memory beside their files.
RESULT_BYTES = 128 << 20


class Service:
    """A `Service` has the parts of a server, in the order in which they start and stop."""

    def __init__(
        self,
        settings: ServerFile,
        store: Store,
        limits: WireLimits,
        observe: Callable[[BatchReport], None] = lambda report: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        """Take an open `store`, which `stop` closes. `clock` and `wall`: see `Resources`."""
        self.settings, self.store = settings, store
        self.folder = Path(settings.data_dir)
        self._limits = limits
        self._observe = observe
        self._clock, self._wall = clock, wall
        self.suspects = CrashSuspects()
        self.hub: TinkerHub | None = None
        self._maintenance: asyncio.Task[None] | None = None

    async def start(self, engines: Sequence[EngineProtocol]) -> TinkerHub:
        """Take up what was going on when the last server stopped, or the last engine was lost. The
        `engines` are open on the base of the settings. Raises StoreError: the data directory is in
        use."""
        settings, folder, loop = self.settings, self.folder, asyncio.get_running_loop()
        results = Results(
            folder / "results",
            ttl_seconds=settings.saving.result_hours * SECONDS_OF_AN_HOUR,
            memory_bytes=RESULT_BYTES,
            clock=self._wall,
        )
        journal, recovery = await asyncio.to_thread(_open_journal, folder / "journal")
        promises = Promises(results)
        covered: deque[tuple[str, int]] = deque()
        host = Host(
            engines, folder, token_budget=settings.token_budget, max_resident=settings.max_resident,
            before_save=promises.store_all, observe=self._observe, apart=self.suspects.is_suspect,
            on_saved=lambda name, position: covered.append((name, position)),
        )  # fmt: skip
        resources = Resources(
            settings, folder, self.store, journal, promises, host, self.suspects, self._clock,
            self._wall, covered=covered,
        )  # fmt: skip
        self.hub = TinkerHub(resources)
        count = await Replay(self.hub, self._limits).run(recovery)
        if count:
            log.info("%d operations of the last server go on", count)
        runs = await self.hub.runs.resume()
        if runs:
            log.info("%d runs of the last server go on", runs)
        self._maintenance = loop.create_task(Maintenance(self.hub).run())
        return self.hub

    def wake(self) -> None:
        """Let waiting polls go, so that connections can close."""
        if self.hub is not None:
            self.hub.resources.promises.wake()

    async def abandon(self) -> None:
        """Stop after the engine was lost, so that `start` can take everything up with another.

        Waiting polls must have been let go, and no request be on its way in.
        """
        if self.hub is None:
            return
        hub, self.hub = self.hub, None
        host = hub.resources.host
        if self._maintenance is not None:
            self._maintenance.cancel()
        hub.resources.promises.closing = True
        await hub.runs.stop(0.0)
        await asyncio.to_thread(host.abandon)
        self.suspects.note(host.losses())
        await self._close(hub)

    async def stop(
        self, ending: Ending | None = None, give_up: Callable[[], None] = lambda: None
    ) -> None:
        """Finish what is queued, for a while; save every adapter. What is left stays in the journal
        and goes on with the next start.

        Args:
            ending: until when; None = it begins now.
            give_up: called when the engine takes too long for what it has begun, or states take too
                long to be saved: has it fail whatever it is asked, and was.
        """
        if ending is None:
            ending = Ending(self.settings.drain_seconds)
            ending.ask()
        if self._maintenance is not None:
            self._maintenance.cancel()
        if self.hub is not None:
            resources = self.hub.resources
            resources.promises.closing = True
            await self.hub.runs.stop(_until(ending.drained))
            while self._is_working(self.hub) and _until(ending.drained):
                await asyncio.sleep(0.05)
            closing = asyncio.create_task(asyncio.to_thread(resources.host.close, cancel=True))
            if not (await asyncio.wait([closing], timeout=_until(ending.saved)))[0]:
                log.warning("the engine is ended in the midst of something; it will be done again")
                give_up()
            await closing
            await self._close(self.hub, _until(ending.saved))
        await asyncio.to_thread(self.store.close)

    def _is_working(self, hub: TinkerHub) -> bool:
        if hub.resources.host.losses():  # nothing that runs now will be finished
            return False
        return any(one.running for one in hub.adapters) or hub.samplers.num_running > 0

    async def _close(self, hub: TinkerHub, seconds: float | None = None) -> None:
        """Close what stands behind a hub that nobody asks any more; see `SubmittedRuns.close`."""
        await asyncio.to_thread(hub.runs.close, seconds)
        await asyncio.to_thread(hub.resources.promises.close)
        await asyncio.sleep(0)  # what the last outcomes left for the loop to do
        await hub.resources.settle()
        await asyncio.to_thread(self._close_journal, hub.resources)

    def _close_journal(self, resources: Resources) -> None:
        try:
            resources.promises.results.flush()
            while resources.covered:
                resources.journal.covered(*resources.covered.popleft())
        except SaveFailed as error:
            log.error("the journal keeps what it could let go: %s", error)
        finally:
            resources.journal.close()


def _until(moment: float) -> float:
    """Return the seconds from now on; none if it is over."""
    return max(0.0, moment - time.monotonic())


def _open_journal(folder: Path) -> tuple[Journal, Any]:
    while True:
        try:
            recovery = Journal.recover(folder)
            return Journal(folder), recovery
        except OSError as error:
            if not no_descriptor_left(error):
                raise
            log.error("the journal is opened when there is a file descriptor for it: %s", error)
            time.sleep(1.0)
