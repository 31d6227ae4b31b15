"""What somebody's code prints goes to a file of its adapter, and not between a run's own lines.

While RL runs exist, stdout and stderr are streams that ask who writes. A thread of somebody's, and
whatever task it starts, has the file in its context; everybody else writes where they always did.
What a child process writes, or a thread that somebody's code starts, is not seen here.
"""

import io
import os
import sys
import threading
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

_MOST_BYTES = 1 << 20


class BoundedLog:
    """A `BoundedLog` keeps the newest of what is written: at most a mebibyte, on the disk too."""

    def __init__(self, path: Path | None, most_bytes: int = _MOST_BYTES):
        """Write to a file that comes to be with the first word; None = forget everything."""
        self._path, self._most = path, most_bytes
        self._lock, self._process = threading.Lock(), os.getpid()

    def write(self, data: bytes) -> None:
        """Append; never raises, since it is called from a `print`."""
        # A lock that another thread held when a child was forked is never released there.
        if self._path is None or not data or os.getpid() != self._process:
            return
        with self._lock, suppress(OSError):
            self._append(self._path, data)

    def _append(self, path: Path, data: bytes) -> None:
        size = path.stat().st_size if path.exists() else 0
        if size + len(data) <= self._most:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(data)
            return
        half = self._most // 2
        kept = data[-half:]
        if len(kept) < half and size:
            with path.open("rb") as file:
                file.seek(max(0, size - (half - len(kept))))
                kept = file.read() + kept
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(b"[what stood here was left out]\n" + kept)
        os.replace(temporary, path)


# Where the running code's output goes; None = where it always goes.
OUTPUT: ContextVar[BoundedLog | None] = ContextVar("OUTPUT", default=None)


class _RawLog(io.RawIOBase):
    """A `_RawLog` is what `sys.stdout.buffer` is to somebody's code."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raw = bytes(data)
        log = OUTPUT.get()
        if log is not None:
            log.write(raw)
        return len(raw)


class _DividedStream:
    """A `_DividedStream` is stdout or stderr to everybody but somebody's code."""

    def __init__(self, inner: TextIO):
        self.inner = inner

    def write(self, text: str) -> int:
        log = OUTPUT.get()
        if log is None:
            return self.inner.write(text)
        log.write(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if OUTPUT.get() is None:
            self.inner.flush()

    def isatty(self) -> bool:
        return OUTPUT.get() is None and self.inner.isatty()

    @property
    def buffer(self) -> Any:
        return self.inner.buffer if OUTPUT.get() is None else _RawLog()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


_lock = threading.Lock()
_users = 0


def divide_output() -> None:
    """Have stdout and stderr ask who writes, until `join_output` was called as often as this."""
    global _users
    with _lock:
        _users += 1
    keep_divided()


def keep_divided() -> None:
    """Divide them again if somebody has put streams of their own in place since."""
    with _lock:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if _users and stream is not None and not isinstance(stream, _DividedStream):
                setattr(sys, name, _DividedStream(stream))


def join_output() -> None:
    """Take back one `divide_output`; with the last one, streams are what they were."""
    global _users
    with _lock:
        _users -= 1
        for name in ("stdout", "stderr"):
            while not _users and isinstance(stream := getattr(sys, name), _DividedStream):
                setattr(sys, name, stream.inner)
