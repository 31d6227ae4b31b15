"""A promise stands for an accepted request: who waits for it, and what came out.

A promise lives in memory until its outcome is known; from then on the outcome is a stored result,
readable until its time is over.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from manylora.service.contract import Failed, Outcome, Ready, Waiting
from manylora.service.http_errors import answer_to
from manylora.service.state.result_files import Results
from manylora.types import Cancelled, DataError, EngineLost, SaveFailed

log = logging.getLogger("manylora.service")

FAILURE_TYPE = "application/vnd.manylora.failure+json"

Encode = Callable[[Any], tuple[str, bytes]]
Then = Callable[[BaseException | None], None]


@dataclass(slots=True)
class Promise:
    """A `Promise` is one accepted request without an outcome yet.

    Attributes:
        digest: of its contents, to tell a repeated submit from another one.
        durable: done once the request is in the journal.
        outcome: kept here only if it could not be stored.
    """

    request_id: str
    tenant: str
    digest: str
    durable: asyncio.Future[None]
    known: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome | None = None


class Promises:
    """These are a server's requests. Methods run on the event loop unless they say else."""

    def __init__(self, results: Results):
        self.results = results
        self.closing = False
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, Promise] = {}
        # One thread: outcomes of one adapter are stored in the order of its operations.
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="manylora-results")

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def open(self, request_id: str, tenant: str, digest: str) -> Promise:
        """Expect an outcome; `Promise.durable` is the caller's to settle."""
        promise = Promise(request_id, tenant, digest, self._loop.create_future())
        self._open[request_id] = promise
        return promise

    def repeated(self, request_id: str, digest: str) -> Promise | None:
        """Return the promise that an equal request was given, if its outcome is still to come.
        Raises DataError: the number was used for something else."""
        promise = self._open.get(request_id)
        if promise is not None and promise.digest != digest:
            raise DataError(
                f"request {request_id!r} was made before with other contents; every request takes "
                "the next sequence number"
            )
        return promise

    def drop(self, request_id: str) -> None:
        """Expect nothing any more."""
        promise = self._open.pop(request_id, None)
        if promise is not None:
            promise.known.set()

    def follow(
        self, request_id: str, future: Future[Any], encode: Encode, then: Then = lambda error: None
    ) -> None:
        """Store what a future brings. `encode` turns a result into content type and body, on a
        thread of its own; `then` is called on the event loop once the outcome can be read, with the
        error, if it is one."""

        def finish(done: Future[Any]) -> None:
            try:
                self._finisher.submit(self._finish, request_id, done, encode, then)
            except RuntimeError:
                log.debug("%s ended after the server did; it will run again", request_id)

        future.add_done_callback(finish)

    def settle(self, request_id: str, outcome: Any, encode: Encode) -> None:
        """Store an outcome that needed no operation: a value, or an error."""
        future: Future[Any] = Future()
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        self.follow(request_id, future, encode)

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome | None:
        """Return what came of a request, or that it is still to come after `timeout` seconds. None:
        the tenant has no such request, or its result's time is over."""
        promise = self._open.get(request_id)
        if promise is not None:
            if promise.tenant != tenant:
                return None
            if self.closing:
                return Waiting()
            try:
                await asyncio.wait_for(promise.known.wait(), timeout)
            except TimeoutError:
                return Waiting()
            if promise.outcome is not None:
                return promise.outcome
            if self.closing:
                return Waiting()
        result = self.results.recent(request_id)
        if result is None:
            result = await asyncio.to_thread(self.results.get, request_id)
        if result is None or result.owner != tenant:
            return None
        return _outcome(result.content_type, result.body)

    def let_go(self) -> None:
        """Forget outcomes that could not be stored at first, and now are."""
        for id, promise in list(self._open.items()):
            if promise.outcome is not None and self.results.is_written(id):
                del self._open[id]

    def store_all(self) -> None:
        """Return once every outcome that is known by now is durable. Not on the event loop."""
        self._finisher.submit(lambda: None).result()
        self.results.flush()

    def wake(self) -> None:
        """Let every waiting poll go: the server is about to stop."""
        self.closing = True
        for promise in self._open.values():
            promise.known.set()

    def close(self) -> None:
        """Finish storing what is known."""
        self._finisher.shutdown(wait=True)

    # -- inside ---------------------------------------------------

    def _finish(self, request_id: str, done: Future[Any], encode: Encode, then: Then) -> None:
        promise = self._open.get(request_id)
        error: BaseException | None = None
        try:
            content_type, body = encode(done.result())
        except BaseException as caught:
            if isinstance(caught, EngineLost) or (self.closing and isinstance(caught, Cancelled)):
                return  # it is in the journal, and runs after the next start
            error, answer = caught, answer_to(caught, request_id)
            told = {"error": answer.message, "category": answer.category}
            content_type, body = FAILURE_TYPE, json.dumps(told).encode()
        if promise is not None:
            try:
                self.results.put(request_id, promise.tenant, content_type, body)
            except SaveFailed as full:
                log.error("the result of %s is kept in memory only: %s", request_id, full)
                promise.outcome = _outcome(content_type, body)
        self._loop.call_soon_threadsafe(self._settled, request_id, error, then)

    def _settled(self, request_id: str, error: BaseException | None, then: Then) -> None:
        promise = self._open.get(request_id)
        if promise is not None:
            promise.known.set()
            if promise.outcome is None:
                del self._open[request_id]
        then(error)


def _outcome(content_type: str, body: bytes) -> Outcome:
    if content_type == FAILURE_TYPE:
        failure = json.loads(body)
        return Failed(failure["error"], failure["category"])
    return Ready(content_type, body)
