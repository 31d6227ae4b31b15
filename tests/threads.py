"""The tests compute under a fixed number of threads, on which a sum's bits may depend.

One number holds for the session, for the processes that tests start, and for every fixture that is
shared by several tests. It is `OMP_NUM_THREADS`; 1 if that is not set.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SESSION = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))

_expected = [SESSION]


def set_expected() -> None:
    """Let torch, if it has been imported, use the number that is expected now.

    It is set even where this thread has it: another thread that opened an engine with a number of
    its own has left that to every thread that begins after it, and this one does not see it.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(_expected[-1])


def check_expected() -> None:
    """Check torch's number: bits may be compared only if one number computed both sides."""
    import torch

    found = torch.get_num_threads()
    assert found == _expected[-1], f"{found} threads compute; {_expected[-1]} are expected"


@contextmanager
def under(number: int) -> Iterator[int]:
    """Compute under another number for a while."""
    _expected.append(number)
    set_expected()
    try:
        yield number
    finally:
        _expected.pop()
        set_expected()
