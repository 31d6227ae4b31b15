"""One server and one working directory for all recipes."""

from collections.abc import Iterator

import pytest

from tests.cookbook.fixtures import ANSWERER, make_workplace
from tests.cookbook.recipes import Workplace
from tests.wire.server import Server


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A server without keys, and the recipes' data."""
    folder = make_workplace(tmp_path_factory.mktemp("cookbook"))
    with Server(tmp_path_factory.mktemp("served"), "--alias", ANSWERER) as server:
        yield Workplace(folder, server)
