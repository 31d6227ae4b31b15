"""The objects of a running service share these."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora.config import ServerFile
from manylora.hosting import Host
from manylora.journal import Journal, Record
from manylora.service.http_errors import Backpressure
from manylora.service.state.crash_suspects import CrashSuspects
from manylora.service.state.ledger import Ledger
from manylora.service.state.promises import Promises
from manylora.store import Store
from manylora.types import DataError

log = logging.getLogger("manylora.service")


class Coming:
    """`Coming` knows snapshots still being made, and who waits for them. On the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    def expect(self, name: str) -> None:
        """Note that an operation that makes it was accepted."""
        self._waiting.setdefault(name, [])

    def __contains__(self, name: str) -> bool:
        return name in self._waiting

    def arrived(self, name: str) -> None:
        """Note that the operation is over, whatever came of it."""
        for call in self._waiting.pop(name, ()):
            call()

    def when_there(self, name: str | None, call: Callable[[], None]) -> None:
        """Call back at once, or when the operation is over."""
        if name is not None and name in self._waiting:
            self._waiting[name].append(call)
        else:
            call()


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A `HeldRequest` is what a request is counted as until it is done.

    Attributes:
        tokens: in flight.
        body_bytes: of its body, as it came.
        decoded_bytes: of the tensors that were made from it.
    """

    tenant: str
    tokens: int
    body_bytes: int
    decoded_bytes: int = 0


@dataclass(slots=True)
class Resources:
    """`Resources` are one server's settings and the things that it is made of.

    Attributes:
        suspects: operations that were running when an engine was lost.
        clock: of silences and of what is due; monotonic.
        wall: unix seconds.
        coming: snapshots that accepted operations will make.
        in_flight: tenant → tokens of its requests that were accepted and are not done.
        waiting: bytes of the bodies of accepted requests that are not done.
        decoded: bytes of the tensors that were made from them.
        covered: streams of the journal and up to which number they are needed no longer;
            `Maintenance` tells the journal, once the results that replace them are durable.
    """

    settings: ServerFile
    folder: Path
    store: Store
    journal: Journal
    promises: Promises
    host: Host
    suspects: CrashSuspects = field(default_factory=CrashSuspects)
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    coming: Coming = field(default_factory=Coming)
    in_flight: dict[str, int] = field(default_factory=dict)
    covered: deque[tuple[str, int]] = field(default_factory=deque)
    waiting: Ledger = field(init=False)
    decoded: Ledger = field(init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        each, in_all = self.settings.quotas, self.settings.memory
        self.waiting = Ledger("requests", each.waiting_bytes, in_all.waiting_bytes)
        self.decoded = Ledger("decoded tensors", each.decoded_bytes, in_all.decoded_bytes)

    @property
    def base_names(self) -> list[str]:
        """Clients may call the base by each of these names."""
        return [self.settings.base, *self.settings.aliases]

    def check_base(self, name: str) -> None:
        """Raise DataError if the server has another base."""
        if name not in self.base_names:
            names = " or ".join(self.base_names)
            raise DataError(f"base_model is {name!r}; this server's is {names}")

    def enter(self, tenant: str, tokens: int) -> None:
        """Count a request's tokens in. Raises Backpressure: the tenant has too many in flight; one
        request is always let in."""
        held, limit = self.in_flight.get(tenant, 0), self.settings.quotas.tokens_in_flight
        if held and held + tokens > limit:
            raise Backpressure(
                f"{held:,} tokens of your requests are in flight, and {limit:,} may be; "
                "this request is welcome once some of them are done"
            )
        self.in_flight[tenant] = held + tokens

    def in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that no request waits for; what it raises is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def settle(self) -> None:
        """Wait for what runs in the background; none of it waits for room any more."""
        self.decoded.close()
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("something in the background failed", exc_info=task.exception())

    def finished(self, request_id: str) -> None:
        """Note that a request that changed nothing has its outcome."""
        self.covered.append((request_id, 1))

    def leave(self, tenant: str, tokens: int) -> None:
        """Count a request's tokens out."""
        left = self.in_flight.get(tenant, 0) - tokens
        if left > 0:
            self.in_flight[tenant] = left
        else:
            self.in_flight.pop(tenant, None)

    def count_in(self, held: HeldRequest) -> None:
        """Count a request as held, or nothing of it. Raises TooLarge: it is more than can ever be
        held; Backpressure: it does not fit now."""
        self.decoded.check(held.decoded_bytes)
        with ExitStack() as undo:
            self.enter(held.tenant, held.tokens)
            undo.callback(self.leave, held.tenant, held.tokens)
            self.waiting.enter(held.tenant, held.body_bytes)
            undo.callback(self.waiting.leave, held.tenant, held.body_bytes)
            if held.decoded_bytes:
                self.decoded.enter(held.tenant, held.decoded_bytes)
            undo.pop_all()

    def count_out(self, held: HeldRequest) -> None:
        """Count out a request that is done, or was not accepted after all."""
        self.leave(held.tenant, held.tokens)
        self.waiting.leave(held.tenant, held.body_bytes)
        self.decoded.leave(held.tenant, held.decoded_bytes)

    async def accept(self, record: Record) -> bool:
        """Make a request durable and expect its outcome. Equal requests are accepted once: return
        False if an equal one was accepted before and is not done.

        Raises:
            DataError: the number was used for a request with other contents.
            SaveFailed: the journal cannot be written; nothing was accepted.
        """
        promises, request_id = self.promises, record.request_id
        earlier = promises.repeated(request_id, record.digest)
        if earlier is not None:
            await asyncio.shield(earlier.durable)
            return False
        promise = promises.open(request_id, record.tenant, record.digest)
        try:
            await asyncio.wrap_future(self.journal.append(record))
        except BaseException as error:
            promises.drop(request_id)
            promise.durable.set_exception(error)
            promise.durable.exception()  # perhaps no request waits
            raise
        promise.durable.set_result(None)
        return True
