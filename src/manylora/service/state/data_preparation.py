"""One run's data are read and tokenised at a time, in turns between tenants.

Tokenizers are not made for several threads, and a tenant's data may take minutes. So a preparation
is asked, every few examples, to let another tenant's go on; a tenant's own runs follow each other.
"""

import asyncio
from collections import deque

# Preparations that have begun and wait for their next turn: each holds a thread, and its data.
MOST_PAUSED = 32


class Preparing:
    """`Preparing` gives out the turns of a server. It belongs to one event loop."""

    def __init__(self) -> None:
        self._busy = False
        # Tenants of whom something could go on, the next one first; each once.
        self._next: deque[str] = deque()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        self._paused: dict[str, asyncio.Future[None]] = {}
        self._begun: set[str] = set()

    def of(self, tenant: str) -> "PreparationTurn":
        """Return a preparation of that tenant: `async with` it."""
        return PreparationTurn(self, tenant)

    @property
    def others_wait(self) -> bool:
        """Another tenant's preparation could go on. Any thread."""
        return bool(self._next) and len(self._paused) < MOST_PAUSED

    async def begin(self, tenant: str) -> None:
        """Wait for the first turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append(turn)
        if tenant not in self._begun and tenant not in self._next:
            self._next.append(tenant)
        self._go_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.end(tenant)
            raise

    async def pass_on(self, tenant: str) -> None:
        """Let the others have a turn each, if there are any, and wait for the next one."""
        if not self.others_wait:
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._paused[tenant] = turn
        self._next.append(tenant)
        self._busy = False
        self._go_on()
        await turn

    def end(self, tenant: str) -> None:
        """Note that the preparation is over, or has failed."""
        self._busy = False
        self._begun.discard(tenant)
        if self._lines.get(tenant):
            self._next.append(tenant)
        else:
            self._lines.pop(tenant, None)
        self._go_on()

    # -- inside ---------------------------------------------------

    def _go_on(self) -> None:
        while not self._busy and self._next:
            tenant = self._next.popleft()
            turn = self._paused.pop(tenant, None)
            line = self._lines.get(tenant, deque())
            while turn is None and line:
                turn = line.popleft()
                if turn.done():  # what waited was cancelled
                    turn = None
            if turn is not None and not turn.done():
                self._busy = True
                self._begun.add(tenant)
                turn.set_result(None)


class PreparationTurn:
    """A `PreparationTurn` is one preparation."""

    def __init__(self, preparing: Preparing, tenant: str) -> None:
        self._preparing, self._tenant = preparing, tenant
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> None:
        await self._preparing.begin(self._tenant)
        self._loop = asyncio.get_running_loop()

    async def __aexit__(self, *raised: object) -> None:
        self._preparing.end(self._tenant)

    def pass_on(self) -> None:
        """Let other tenants go first, between two examples; called on the thread that prepares."""
        if self._loop is not None and self._preparing.others_wait:
            work = self._preparing.pass_on(self._tenant)
            asyncio.run_coroutine_threadsafe(work, self._loop).result()
