"""One thread writes states in the order in which they were handed to it."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

log = logging.getLogger("manylora.api")

Result = TypeVar("Result")


class Writer:
    """A writer is a queue of writes with bounded memory. Methods belong to the engine's thread."""

    def __init__(self, max_bytes: int):
        """Start the thread. What waits may take `max_bytes`; a single write may take more."""
        self._max_bytes = max_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="manylora-writer")
        self._waiting: deque[tuple[Future[Any], int]] = deque()

    def write(
        self, write: Callable[[], Result], num_bytes: int, *, quiet: bool = False
    ) -> "Future[Result]":
        """Queue a write that keeps `num_bytes` of memory; wait while too much is queued. `quiet`:
        the caller looks at the future; a failure need not be logged."""
        future = self._thread.submit(write)
        if not quiet:
            future.add_done_callback(_log_failure)
        self._waiting.append((future, num_bytes))
        while self._waiting and self._waiting[0][0].done():
            self._waiting.popleft()
        while len(self._waiting) > 1 and sum(size for _, size in self._waiting) > self._max_bytes:
            self._waiting.popleft()[0].exception()
        return future

    def drain(self) -> None:
        """Wait until everything is written, or has failed."""
        while self._waiting:
            self._waiting.popleft()[0].exception()

    def close(self) -> None:
        """Write what is queued, and stop."""
        self.drain()
        self._thread.shutdown()


def _log_failure(future: Future[Any]) -> None:
    error = future.exception()
    if error is not None:
        log.error("a background write failed: %s", error)
