"""What all tests share: tiny bases, and a fixed number of threads."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.models import TinyBases

# No test may wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait should sleep: a spinning one takes the core that the other needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

THREADS = 1


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyBases":
    """`tiny("qwen3", tie_word_embeddings=True)` → the folder of such a base."""
    from tests.models import TinyBases

    return TinyBases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's number of threads during this test; a test may parametrize it indirectly.

    Bits are compared between runs with the same number.
    """
    import torch

    before = torch.get_num_threads()
    number = int(getattr(request, "param", THREADS))
    torch.set_num_threads(number)
    yield number
    torch.set_num_threads(before)
