"""A server whose engine is two actors on two nodes of a Ray cluster."""

import threading
from collections.abc import Iterator

import pytest
import tinker

from tests.parallel.ray_cluster import TwoNodes, kill
from tests.wire.data import random_data, sdk_adam, to_sdk
from tests.wire.server import BASE_ALIAS, Server
from tests.wire.test_crash import STEP
from tests.wire.weights import assert_same_factors, exported_factors

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    yield nodes
    nodes.close()


def learn(service: tinker.ServiceClient, half: threading.Event) -> tinker.TrainingClient:
    client = service.create_lora_training_client(BASE_ALIAS, rank=5, seed=3).result()
    for step in range(STEPS):
        data = to_sdk(random_data(step, 5, lengths=(5, 40)))
        loss = client.forward_backward(data, "cross_entropy")
        client.optim_step(sdk_adam(STEP)).result()
        loss.result()
        if step == STEPS // 2:
            half.set()
    return client


def test_the_loss_of_an_actor_is_a_pause(cluster: TwoNodes, serve, connect) -> None:
    mesh = ("--mesh", "dp=2")
    local: Server = serve(*mesh, folder="calm")
    calm = exported_factors(local, learn(connect(local), threading.Event()), "end")
    shaken: Server = serve(*mesh, "--ray", cluster.address, folder="shaken")
    before, half = cluster.actors(), threading.Event()
    assert len(set(before.values())) == 2

    def shake() -> None:
        half.wait()
        kill(min(before))

    shaker = threading.Thread(target=shake)
    shaker.start()
    client = learn(connect(shaken), half)
    shaker.join()
    found = exported_factors(shaken, client, "end")
    assert len(cluster.actors()) == 2 and not set(cluster.actors()) & set(before)
    assert_same_factors(found, calm)
