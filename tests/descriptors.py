"""A process that has as many files open as it may, for as long as a test likes."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from manylora.types import TooManyFilesOpen


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """So many more files can be opened here. Whatever the body imports must be imported before."""
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
    """However few descriptors are left, `read` gives what it gives with many, or says that there
    are too few; with none it says so."""
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
