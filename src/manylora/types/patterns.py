"""Regular expressions from outside are matched with module names within bounds.

A pattern of a downloaded file may take centuries, or more memory than the machine has. So it is
bounded before it is compiled, and by time while it is matched. It means what `re` takes it to mean:
`re` must accept it, and what `regex` alone would understand is refused.
"""

import re
import time
from functools import lru_cache

import regex

# Characters of a pattern, with what its counted repeats ({m,n}) multiply.
LONGEST = 1 << 16
# Processor seconds of one match, which take microseconds, and of all that belong together.
ONE_MATCH, ALL_MATCHES = 0.1, 1.0

_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class BadPattern(ValueError):
    """A pattern is no regular expression, or beyond the bounds; the message is the reason alone."""


class Matching:
    """A `Matching` bounds the time of matches that belong together, such as one adapter's."""

    def __init__(self, seconds: float = ALL_MATCHES):
        """Allow all matches together `seconds` of this thread."""
        self._left = seconds

    def full(self, pattern: str, name: str) -> bool:
        """Return whether the pattern matches the whole name; raise `BadPattern` out of bounds."""
        return self._run(pattern, name, whole=True) is not None

    def start(self, pattern: str, name: str) -> "regex.Match[str] | None":
        """Return the match of a beginning of the name; raise `BadPattern` out of bounds."""
        return self._run(pattern, name, whole=False)

    def _run(self, pattern: str, name: str, *, whole: bool) -> "regex.Match[str] | None":
        found = compiled(pattern)
        match = found.fullmatch if whole else found.match
        begun = time.thread_time()
        try:
            result = match(name, timeout=ONE_MATCH)
        except (TimeoutError, MemoryError, RecursionError):
            self._left = 0.0
            result = None
        self._left -= time.thread_time() - begun
        if self._left <= 0.0:
            raise BadPattern("it takes too long to match with names of modules; write it simpler")
        return result


def shown(pattern: str) -> str:
    """Return a pattern as messages quote it."""
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}…")


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> "regex.Pattern[str]":
    """Compile a pattern to be matched with a timeout; raise `BadPattern` if that is impossible."""
    _check_size(pattern)
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError) as error:
        raise BadPattern(str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise BadPattern("it is nested too deeply") from error


def _check_size(pattern: str) -> None:
    size = len(pattern)
    for brace in re.finditer(r"\{", pattern):
        repeat = _REPEAT.match(pattern, brace.start())
        if repeat is None:
            raise BadPattern("a brace that is no repeat such as {2,4} is in no module's name")
        # Read as text: a number of a thousand digits is not made one.
        numbers = [(digits or "").lstrip("0")[:9] for digits in repeat.groups()]
        size *= max(1, *(int(number or 0) for number in numbers))
        if size > LONGEST:
            break
    if size > LONGEST:
        raise BadPattern(f"it is longer than {LONGEST:,} characters, counted repeats multiplied")
