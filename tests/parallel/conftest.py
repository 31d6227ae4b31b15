"""What one process computes beside the ranks, it computes as they do: on one thread."""

from collections.abc import Iterator

import pytest

from tests.threads import under


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The ranks have one thread each, and bits are compared."""
    with under(1):
        yield
