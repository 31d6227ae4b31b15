"""The first Ctrl-C or SIGTERM asks the run to stop, the second ends it at once."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

EXIT_INTERRUPTED = 130
ECHO_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopper:
    """A `Stopper` handles signals for as long as a run lasts.

    Before there is an event loop (hashing, opening the base) nothing has been trained, so the
    signal is an ordinary KeyboardInterrupt. From then on it only asks: adapters look at it between
    operations.
    """

    def __init__(self, *, restore_terminal: Callable[[], None] = lambda: None) -> None:
        self._restore_terminal = restore_terminal
        self._before: dict[int, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[str], None] | None = None
        self._asked_at: float | None = None

    def __enter__(self) -> Self:
        # Python only lets the main thread do this; elsewhere the caller owns the signals.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, loop: asyncio.AbstractEventLoop, stop: Callable[[str], None]) -> None:
        """Have a signal call `stop(name of the signal)` within the loop from now on; one that came
        between two loops does so now."""
        self._loop, self._stop = loop, stop
        if self._asked_at is not None:
            loop.call_soon(stop, "the signal before")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            # Launchers pass on a Ctrl-C that the terminal has already sent to every process.
            if now - self._asked_at < ECHO_SECONDS:
                return
            self._restore_terminal()
            os._exit(EXIT_INTERRUPTED)
        self._asked_at = now
        if self._loop is None or self._stop is None:
            raise KeyboardInterrupt
        if self._loop.is_closed():
            return  # training is over, and what is left to write is short
        self._loop.call_soon_threadsafe(self._stop, signal.Signals(number).name)
