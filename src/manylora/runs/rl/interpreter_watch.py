"""Somebody's code that holds the interpreter stops every thread of the run; it is named.

A thread of our own wakes up four times a second. If it comes to that much too late, nobody else
could run either, and whose thread computed most in between is who did it.
"""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

HELD_SECONDS = 2.0
_BEAT = 0.25

# Told in words what held the interpreter.
Warn = Callable[[str], None]


@dataclass(eq=False, slots=True)
class WatchedCall:
    """A `WatchedCall` is a function of somebody's that runs.

    Attributes:
        what: what to call it.
        cpu: processor seconds of its thread when it was looked at last.
    """

    what: str
    warn: Warn
    thread: int = field(default_factory=threading.get_ident)
    cpu: float = field(default_factory=time.thread_time)
    ended: float | None = None


class InterpreterWatch:
    """An `InterpreterWatch` is one for the process: whoever holds the interpreter holds it all."""

    def __init__(self, held_seconds: float = HELD_SECONDS):
        """Warn of what holds the interpreter for so long."""
        self._held = held_seconds
        self._lock = threading.Lock()
        self._calls: list[WatchedCall] = []
        self._thread: threading.Thread | None = None
        self._told: set[str] = set()

    def enter(self, what: str, warn: Warn) -> WatchedCall:
        """Begin to watch the calling thread; `leave` must follow on the same one."""
        call = WatchedCall(what, warn)
        with self._lock:
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="manylora-watch", daemon=True
                )
                self._thread.start()
        return call

    def leave(self, call: WatchedCall) -> None:
        """End it; it is looked at once more, since it may be what held up the watch."""
        with self._lock:
            call.ended = time.thread_time()

    def _watch(self) -> None:
        idle = 0
        while idle < 40:  # ten seconds
            begun = time.monotonic()
            time.sleep(min(_BEAT, self._held / 4))
            late = time.monotonic() - begun
            with self._lock:
                alive = {thread.ident for thread in threading.enumerate()}
                spent = [(_spent(call, alive), call) for call in self._calls]
                self._calls = [call for call in self._calls if call.ended is None]
                idle = 0 if spent else idle + 1
                if idle >= 40:
                    self._thread = None
            if late >= self._held and spent:
                self._tell(late, spent)

    def _tell(self, late: float, spent: list[tuple[float, WatchedCall]]) -> None:
        busy = [call for seconds, call in spent if seconds >= late / 2]
        suspects = {call.what: call.warn for call in busy or [call for _, call in spent]}
        names = ", ".join(sorted(suspects))
        if names in self._told:
            return
        self._told.add(names)
        one = "held" if len(suspects) == 1 else "ran, and one of them held"
        for warn in set(suspects.values()):
            warn(
                f"{names} {one} the interpreter for {late:.1f} s, in which no adapter of the run "
                "could go on; such work belongs into a process of its own"
            )


def _spent(call: WatchedCall, alive: Collection[int | None]) -> float:
    """Return the processor seconds of a call since it was last looked at."""
    if call.ended is not None:
        return call.ended - call.cpu
    if call.thread not in alive or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    before, call.cpu = call.cpu, time.clock_gettime(time.pthread_getcpuclockid(call.thread))
    return call.cpu - before


WATCH = InterpreterWatch()
