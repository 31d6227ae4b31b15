"""All tests share these fixtures: tiny bases, and a fixed number of threads."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# Before torch is imported, which reads the number once.
from tests import threads as number_of_threads

if TYPE_CHECKING:
    from tests.models import TinyBases

# No test may wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait should sleep: a spinning one takes the core that the other needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The Tinker SDK reads these when it is imported, by whichever test comes first.
os.environ["TINKER_TELEMETRY"] = "0"
os.environ.pop("TINKER_BASE_URL", None)
os.environ.pop("TINKER_API_KEY", None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Run each test under the session's number, whichever the test before it left behind."""
    with number_of_threads.under(number_of_threads.SESSION):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Iterator[object]:
    """Make what several tests share under the session's number, whichever test asks first."""
    if fixturedef.scope == "function":
        return (yield)
    with number_of_threads.under(number_of_threads.SESSION):
        return (yield)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyBases":
    """Return tiny bases: `tiny("qwen3", tie_word_embeddings=True)` is the folder of such a base."""
    from tests.models import TinyBases

    return TinyBases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Fix torch's number of threads during this test; a test may parametrize it indirectly.

    Bits are compared between runs with one number. Wider fixtures compute with the session's, so a
    test that compares with them does not parametrize this.
    """
    with number_of_threads.under(int(getattr(request, "param", number_of_threads.SESSION))) as it:
        number_of_threads.check_expected()
        yield it
        number_of_threads.check_expected()
