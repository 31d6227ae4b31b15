"""A server's process ends in order as long as there is time, and in time whatever waits.

What was acknowledged is in the journal, so whatever is broken off goes on with the next start; what
takes too long is therefore broken off.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from queue import SimpleQueue

log = logging.getLogger("manylora.service")

# From the signal on, requests in hand have so long to be answered; then their connections are cut.
CONNECTION_SECONDS = 3.0
# After the drain: when the engine is given up that is still computing or saving states, and when
# the process is over.
SAVING_SECONDS = 5.0
LAST_SECONDS = 8.0
# How long the log may take to be told why.
_WORD_SECONDS = 0.5


class Ending:
    """An `Ending` says when each part of a stop has to be over, by `time.monotonic`."""

    def __init__(self, drain_seconds: float):
        """Let what is queued go on for `drain_seconds`."""
        self._drain_seconds = drain_seconds
        self._asked_at: float | None = None
        # Its `put` may be called by a signal handler, whatever that interrupts.
        self._requests: SimpleQueue[int] = SimpleQueue()

    def enforce(self) -> None:
        """End the process in time from now on, whatever it waits for."""
        threading.Thread(target=self._watch, name="manylora-ending", daemon=True).start()

    def ask(self, status: int = 0) -> None:
        """Begin to stop, unless that was asked before. A signal handler may. Should the process
        have to be broken off, it ends with `status`."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._requests.put(status)

    def hurry(self) -> None:
        """Drain no longer. A signal handler may."""
        self._drain_seconds = 0.0

    @property
    def drained(self) -> float:
        """By then, what is queued has run, or waits for the next start."""
        assert self._asked_at is not None
        return self._asked_at + self._drain_seconds

    @property
    def saved(self) -> float:
        """By then, states are saved, or will be made again from the journal."""
        return self.drained + SAVING_SECONDS

    @property
    def over(self) -> float:
        """By then, the process is gone."""
        return self.drained + LAST_SECONDS

    def _watch(self) -> None:
        """Leave threads that hang, and a disk that does, behind; nothing else can be done."""
        status = self._requests.get()
        while (rest := self.over - time.monotonic()) > 0:
            time.sleep(min(rest, 0.2))
        # What reads the log may hang as well.
        telling = threading.Thread(target=_tell, daemon=True)
        telling.start()
        telling.join(_WORD_SECONDS)
        os._exit(status)


def _tell() -> None:
    log.error("the server could not end in order; what was not saved goes on with the next start")
    faulthandler.dump_traceback(sys.stderr)
