"""A test can leave its process few descriptors, or none, for as long as it likes."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from manylora.types import TooManyFilesOpen


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let the body open `count` more files. What it imports must have been imported before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, before[1]))
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            for _ in range(count):
                os.close(held.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in held:
            os.close(descriptor)


def told_or_done(read: Callable[[], Any], most: int = 4) -> None:
    """Check that `read` returns what it does with many descriptors, or says that too few are left.

    With none left it must say so.
    """
    expected = read()
    for count in range(most):
        with descriptors_left(count):
            try:
                found = read()
            except TooManyFilesOpen as error:
                found = error
        if isinstance(found, TooManyFilesOpen):
            assert "try again" in str(found)
        else:
            assert count > 0 and found == expected, f"{count} left: {found!r}"
    assert read() == expected
