"""A server does this on its own from time to time."""

import asyncio
import logging

from manylora.service.state.hub import TinkerHub
from manylora.service.state.sessions import Session
from manylora.types import ManyloraError

log = logging.getLogger("manylora.service")

EVERY_SECONDS = 1.0
SWEEP_SECONDS = 300.0
SECONDS_OF_AN_HOUR = 3600.0
# A session that is over and in which nothing was made; its client may still ask.
EMPTY_SECONDS = 600.0
# A client goes on sending a lost request for five minutes.
GAP_SECONDS = 330.0
# A journal beyond this many bytes has the states saved that hold it back.
JOURNAL_BYTES = 512 << 20


class Maintenance:
    """`Maintenance` saves states, closes silent sessions, forgets what is no longer needed."""

    def __init__(self, hub: TinkerHub, gap_seconds: float = GAP_SECONDS):
        """Let operations wait `gap_seconds` for one that has not come."""
        self._hub = hub
        self._resources = hub.resources
        self._gap_seconds = gap_seconds
        self._swept_at = hub.resources.clock() - SWEEP_SECONDS
        self._closing: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Run until cancelled. A fault in one round is logged, and the next one comes."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                await self.round()
            except Exception:
                log.exception("a round of upkeep failed")

    async def round(self) -> None:
        """Do everything that is due."""
        now = self._resources.clock()
        self._save_states(now)
        await self._cover()
        for adapter in self._hub.adapters:
            if adapter.order.num_early and now - adapter.arrived_at > self._gap_seconds:
                await self._hub.adapters.close_gap(adapter)
        for session in self._silent():
            if session.id not in self._closing:
                self._closing[session.id] = asyncio.create_task(self._close(session))
        if now - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = now
            await self._sweep()

    def _save_states(self, now: float) -> None:
        every = self._resources.settings.saving.every_seconds
        pinning = set(self._resources.journal.lagging(JOURNAL_BYTES))
        for adapter in self._hub.adapters:
            due = adapter.touched and now - adapter.saved_at > every
            if (due or adapter.id in pinning) and adapter.fault is None and not adapter.closing:
                self._hub.adapters.save(adapter)

    async def _cover(self) -> None:
        """Tell the journal what it need not keep, after the results that replace it are durable."""
        covered = [self._resources.covered.popleft() for _ in range(len(self._resources.covered))]
        if not covered:
            return

        def work() -> None:
            self._resources.promises.results.flush()
            for stream, seq in covered:
                self._resources.journal.covered(stream, seq)

        try:
            await asyncio.to_thread(work)
        except ManyloraError:  # a full disk; the journal keeps it until there is room
            self._resources.covered.extendleft(reversed(covered))
            raise

    def _silent(self) -> list[Session]:
        """Return sessions that have been silent for too long and have nothing queued."""
        seconds = self._resources.settings.session_seconds
        return [s for s in self._hub.sessions.silent(seconds) if not self._is_busy(s)]

    def _is_busy(self, session: Session) -> bool:
        own = (adapter for adapter in self._hub.adapters if adapter.row.session_id == session.id)
        waiting = any(adapter.running or adapter.order.num_early for adapter in own)
        return waiting or self._hub.samplers.is_busy(session.id)

    async def _close(self, session: Session) -> None:
        """End a silent session. What its adapters have learned since they were last saved is kept
        as a checkpoint."""
        log.info("session %s is silent; its models are saved and closed", session.id)
        try:
            for adapter in self._hub.adapters:
                if adapter.row.session_id == session.id and adapter.fault is None:
                    await self._hub.adapters.keep_last(adapter)
            if session not in self._silent():  # it came back meanwhile
                return
            await self._hub.sessions.end(session, "silent")
            await self._hub.close_adapters(session.tenant, session.id)
        except ManyloraError as error:
            log.error("session %s could not be closed: %s", session.id, error)
        finally:
            self._closing.pop(session.id, None)

    async def _sweep(self) -> None:
        saving, store = self._resources.settings.saving, self._resources.store
        steps = {adapter.id: adapter.steps for adapter in self._hub.adapters}

        def work() -> None:
            self._resources.promises.results.sweep()
            self._hub.checkpoints.remove_expired()
            store.tidying.forget(EMPTY_SECONDS, saving.session_hours * SECONDS_OF_AN_HOUR)
            self._hub.runs.forget_old()
            store.sessions.touch(self._hub.sessions.open_ids())
            store.models.set_steps(steps)

        await asyncio.to_thread(work)
        self._resources.promises.let_go()
        await self._hub.samplers.drop_unused(saving.snapshot_hours * SECONDS_OF_AN_HOUR)
