"""What was acknowledged is not lost: a server that is killed and started again goes on."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tinker

from manylora.types import AdamParams
from tests.family import engine_processes
from tests.wire.data import random_data, sdk_adam, to_sdk
from tests.wire.server import BASE_ALIAS, Server
from tests.wire.weights import Array, assert_same_factors, exported_factors

TENANTS, STEPS, AHEAD, KILLS = 3, 40, 6, 3
STEP = AdamParams(lr=2e-3, beta2=0.95, weight_decay=0.01, clip_norm=0.5)

Factors = dict[str, tuple[Array, Array]]


def learn(service: tinker.ServiceClient, number: int) -> tinker.TrainingClient:
    """Train an adapter, some steps ahead of their results."""
    client = service.create_lora_training_client(
        BASE_ALIAS, rank=2 + 3 * number, seed=number
    ).result()
    waiting: list[tinker.APIFuture[Any]] = []
    for step in range(STEPS):
        data = to_sdk(random_data(1000 * number + step, 2, lengths=(5, 40)))
        waiting.append(client.forward_backward(data, "cross_entropy"))
        waiting.append(client.optim_step(sdk_adam(STEP)))
        while len(waiting) > 2 * AHEAD:
            waiting.pop(0).result()
        time.sleep(0.05)
    for future in waiting:
        future.result()
    return client


def everybody(server: Server, connect) -> list[tinker.TrainingClient]:
    with ThreadPoolExecutor(TENANTS) as pool:
        return list(pool.map(lambda n: learn(connect(server), n), range(TENANTS)))


def factors(server: Server, clients: list[tinker.TrainingClient]) -> list[Factors]:
    return [exported_factors(server, client, "end") for client in clients]


@pytest.mark.parametrize(
    "options",
    [pytest.param((), marks=pytest.mark.slow), ("--max-resident", "2")],
    ids=["roomy", "paged"],
)
def test_killed_again_and_again(serve, connect, options: tuple[str, ...]):
    saving = ("--set", "saving.every_steps=7", "--set", "saving.every_seconds=1")
    quiet: Server = serve(*options, folder="calm")
    calm = factors(quiet, everybody(quiet, connect))
    shaken: Server = serve(*options, *saving, folder="shaken")
    done, draw = threading.Event(), random.Random(0)

    def shake() -> None:
        # A client that cannot connect is silent for longer and longer: leave it some time.
        for _ in range(KILLS):
            if not done.wait(draw.uniform(0.3, 1.2)):
                shaken.restart()

    shaker = threading.Thread(target=shake)
    shaker.start()
    try:
        clients = everybody(shaken, connect)
    finally:
        done.set()
        shaker.join()
    assert shaken.num_kills >= 1
    for one, other in zip(factors(shaken, clients), calm, strict=True):
        assert_same_factors(one, other)


@pytest.mark.parametrize("mesh", [pytest.param("dp=1", marks=pytest.mark.slow), "replicas=2"])
def test_an_engine_that_is_killed_again_and_again_is_a_pause(serve, connect, mesh: str):
    """The server stays, and says on `/readyz` when it has no engine."""
    # Replicas share a machine's cores, so their own number of threads would be another.
    one_thread = ("--set", "threads=1")
    quiet: Server = serve(*one_thread, folder="calm")
    calm = factors(quiet, everybody(quiet, connect))
    shaken: Server = serve(
        "--mesh", mesh, "--set", "saving.every_steps=7", *one_thread, folder="shaken"
    )
    done, draw, losses, pauses = threading.Event(), random.Random(1), 0, 0

    def shake() -> None:
        nonlocal losses, pauses
        size = len(engine_processes(shaken.pid))
        while losses < KILLS and not done.wait(draw.uniform(0.3, 1.0)):
            victim = draw.choice(engine_processes(shaken.pid))
            os.kill(victim, signal.SIGKILL)
            losses += 1
            whole = False
            while not whole and not done.wait(0.01):
                ready = shaken.is_ready()
                pauses += not ready
                alive = engine_processes(shaken.pid)
                whole = ready and victim not in alive and len(alive) == size

    shaker = threading.Thread(target=shake)
    shaker.start()
    try:
        clients = everybody(shaken, connect)
    finally:
        done.set()
        shaker.join()
    assert losses >= 1
    assert pauses >= 1
    assert shaken.num_kills == 0
    for one, other in zip(factors(shaken, clients), calm, strict=True):
        assert_same_factors(one, other)


def test_a_stop_drains_saves_and_exits_cleanly(serve, connect):
    server: Server = serve()
    client = connect(server).create_lora_training_client(BASE_ALIAS, rank=4, seed=1).result()
    for step in range(5):
        client.forward_backward(to_sdk(random_data(step, 2)), "cross_entropy")
        last = client.optim_step(sdk_adam(STEP))
    assert server.stop() == 0
    server.start()
    assert last.result().metrics["optim/step"] == 5
    after = exported_factors(server, client, "end")
    assert any(np.abs(b).max() > 0 for _, b in after.values())
