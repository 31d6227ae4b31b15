"""The same server over PostgreSQL."""

from collections.abc import Iterator

import pytest

from tests.postgres import postgres_server
from tests.wire.data import assert_same_bits, forward, random_data, sdk_adam, to_sdk
from tests.wire.server import BASE_ALIAS, Server
from tests.wire.test_many_adapters import STEP

PROBE = random_data(5, 2)


@pytest.fixture
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


def test_trains_saves_and_survives_a_kill(postgres: str, serve, connect):
    server: Server = serve("--set", f"database={postgres}")
    service = connect(server)
    client = service.create_lora_training_client(BASE_ALIAS, rank=4, seed=1).result()
    for step in range(3):
        client.forward_backward(to_sdk(random_data(step, 2)), "cross_entropy")
        client.optim_step(sdk_adam(STEP)).result()
    path = client.save_state("three").result().path
    before = forward(client, PROBE)
    server.restart()
    assert_same_bits(forward(client, PROBE), before)
    loaded = service.create_training_client_from_state_with_optimizer(path).result()
    assert_same_bits(forward(loaded, PROBE), before)
    assert not (server.folder / "manylora.db").exists()
