"""The server's log is lines of JSON on stderr, no more of a kind than a person can read."""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

# So many lines of a kind in so many seconds; of the rest, the number.
MOST_ALIKE, SPAN_SECONDS = 50, 10.0
_MOST_KINDS = 512
# uvicorn tells of what is no HTTP, asyncio of connections that it could not accept.
_OTHERS = ("uvicorn.error", "asyncio")


@dataclass(slots=True)
class _Kind:
    since: float
    count: int = 0
    left_out: int = 0


class Sparing(logging.Filter):
    """A `Sparing` limits lines of a kind: a client that can cause a line could fill a disk.

    The kind of a record is its attribute `like`; None = it always passes. Without one, it is the
    logger's name and the message before anything is put into it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._kinds: dict[object, _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written; then `left_out` says how many like it were not."""
        like = getattr(record, "like", (record.name, record.levelno, record.msg))
        if like is None:
            return True
        now = self._clock()
        if like not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            self._forget(now)
            like = like if len(self._kinds) < _MOST_KINDS else "any"
        kind = self._kinds.setdefault(like, _Kind(now))
        if now - kind.since >= SPAN_SECONDS:
            kind.since, kind.count = now, 0
        kind.count += 1
        if kind.count > MOST_ALIKE:
            kind.left_out += 1
            return False
        record.left_out, kind.left_out = kind.left_out, 0
        return True

    def _forget(self, now: float) -> None:
        old = [like for like, kind in self._kinds.items() if now - kind.since >= SPAN_SECONDS]
        for like in old:
            del self._kinds[like]


class Lines(logging.Formatter):
    """`Lines` are one JSON object each. What our own loggers write as JSON is not quoted again."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        event = text if record.name == "manylora.access" else json.dumps(text)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = f'"time": "{when}", "level": "{record.levelname}", "logger": "{record.name}"'
        if record.exc_info:
            line += f', "traceback": {json.dumps(self.formatException(record.exc_info))}'
        if getattr(record, "left_out", 0):
            line += f', "left_out": {getattr(record, "left_out", 0)}'
        return f'{{{line}, "event": {event}}}'


def log_to_stderr() -> None:
    """Send to stderr what manylora's loggers write, and warnings of the libraries around them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    handler.addFilter(Sparing())
    for name, level in (("manylora", logging.INFO), *((name, logging.WARNING) for name in _OTHERS)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
