"""A ledger counts what tenants hold of something scarce, before it is spent."""

import asyncio
from collections import deque

from manylora.service.http_errors import Backpressure, TooLarge
from manylora.types import Cancelled


class Ledger:
    """A `Ledger` counts bytes held, for each tenant and in all. On the event loop.

    A tenant that holds nothing is let in with one thing of any size up to the smaller bound, so
    none waits for ever; what is larger than that is refused for good.
    """

    def __init__(self, what: str, each: int, in_all: int):
        """Call what is held `what` in messages. A tenant may hold `each` bytes, all `in_all`."""
        self._what, self._each, self._in_all = what, each, in_all
        self._held: dict[str, int] = {}
        self.total = 0  # what all tenants hold
        self._closed = False
        self._waiting: deque[tuple[str, int, asyncio.Future[None]]] = deque()

    def held(self, tenant: str) -> int:
        """Return what one tenant holds."""
        return self._held.get(tenant, 0)

    def check(self, size: int) -> None:
        """Raise TooLarge if so much never fits."""
        allowed = min(self._each, self._in_all)
        if size > allowed:
            raise TooLarge(
                f"the request needs {size:,} bytes of {self._what}, and {allowed:,} are allowed; "
                "send it in smaller parts"
            )

    def fits(self, tenant: str, size: int) -> bool:
        """Return whether there is room now, and no earlier request waits for it."""
        first = any(self._fits_its_own(who, needed) for who, needed, _ in self._waiting)
        return not first and self._fits_its_own(tenant, size) and self._fits_in_all(size)

    def enter(self, tenant: str, size: int) -> None:
        """Count in. Raises TooLarge: it never fits; Backpressure: it does not fit now."""
        self.check(size)
        if not self.fits(tenant, size):
            held = self.held(tenant)
            if held + size > self._each:
                told = f"your requests hold {held:,} bytes of {self._what}, and {self._each:,} may"
            else:
                told = f"the server's {self._in_all:,} bytes of {self._what} are in use"
            raise Backpressure(f"{told} be held; come again in a moment")
        self.take(tenant, size)

    def take(self, tenant: str, size: int) -> None:
        """Count in what has been accepted earlier, whatever is held."""
        if size:
            self._held[tenant] = self.held(tenant) + size
            self.total += size

    def leave(self, tenant: str, size: int) -> None:
        """Count out."""
        if not size:
            return
        left = self._held[tenant] - size
        self.total -= size
        if left:
            self._held[tenant] = left
        else:
            del self._held[tenant]
        self._wake()

    async def enter_in_turn(self, tenant: str, size: int) -> None:
        """Count in as soon as there is room. Those who wait are let in in the order in which they
        came, except that none waits for another tenant's own bound. Raises Cancelled: the server
        stops."""
        if self._closed:
            raise Cancelled("the server is stopping")
        if self.fits(tenant, size):
            self.take(tenant, size)
            return
        there = asyncio.get_running_loop().create_future()
        self._waiting.append((tenant, size, there))
        await there

    def close(self) -> None:
        """Refuse all that wait: `enter_in_turn` raises Cancelled."""
        self._closed = True
        while self._waiting:
            self._waiting.popleft()[2].set_exception(Cancelled("the server is stopping"))

    # -- inside ---------------------------------------------------

    def _fits_its_own(self, tenant: str, size: int) -> bool:
        held = self.held(tenant)
        return not held or held + size <= self._each

    def _fits_in_all(self, size: int) -> bool:
        return not self.total or self.total + size <= self._in_all

    def _wake(self) -> None:
        passed: deque[tuple[str, int, asyncio.Future[None]]] = deque()
        while self._waiting:
            tenant, size, there = self._waiting[0]
            if not self._fits_its_own(tenant, size):
                passed.append(self._waiting.popleft())
                continue
            if not self._fits_in_all(size):
                break  # those behind it would never let it in
            self._waiting.popleft()
            self.take(tenant, size)
            there.set_result(None)
        self._waiting = passed + self._waiting
