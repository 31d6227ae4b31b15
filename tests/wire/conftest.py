"""Servers and SDK clients for the tests of the wire."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import tinker

from tests.wire.forked import ForkedServer, Nursery
from tests.wire.server import DEVELOPER, Server

Serve = Callable[..., Server]
Connect = Callable[..., tinker.ServiceClient]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server without keys for all tests that only need a session of their own."""
    with Server(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """For tests that start servers again and again: `ForkedServer` in place of `Server`."""
    with Nursery() as running:
        ForkedServer.nursery = running
        yield running


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve("--max-resident", "2")` → a server of the test's own."""
    with ExitStack() as stack:

        def start(*options: str, folder: str = "data") -> Server:
            return stack.enter_context(Server(tmp_path / folder, *options))

        yield start


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(server, key)` → a service client, closed when the test is over."""
    clients: list[tinker.ServiceClient] = []

    def open_client(server: Server, key: str = DEVELOPER) -> tinker.ServiceClient:
        clients.append(tinker.ServiceClient(base_url=server.url, api_key=key))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close("success").result(30)


@pytest.fixture
def service(server: Server, connect: Connect) -> tinker.ServiceClient:
    """A session on the shared server."""
    return connect(server)
