"""What the SDK sees of a server does not depend on how many processes its engine has.

The tests are those of one process, with a server of two in the fixture's place.
"""

from collections.abc import Iterator

import pytest

from tests.wire.server import Server
from tests.wire.test_checkpoints import *  # noqa: F403
from tests.wire.test_ordering import *  # noqa: F403
from tests.wire.test_sampling import *  # noqa: F403
from tests.wire.test_training import *  # noqa: F403

MESHES = [
    "dp=2",
    pytest.param("tp=2", marks=pytest.mark.slow),
    pytest.param("replicas=2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=MESHES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("mesh"), "--mesh", request.param) as running:
        yield running
