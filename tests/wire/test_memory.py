"""An engine that runs out of memory is a pause; what always takes too much fails its own model."""

import resource
from pathlib import Path
from typing import Any

import pytest
import tinker

from manylora.types import AdamParams
from tests.family import engine_processes
from tests.wire.data import random_data, sdk_adam, to_sdk
from tests.wire.server import BASE_ALIAS, Server
from tests.wire.weights import assert_same_factors, exported_factors

STEP = AdamParams(lr=2e-3)
SMALL, LARGE = to_sdk(random_data(1, 2)), to_sdk(random_data(2, 8, lengths=(480, 500)))
# Beside what a process has after a small step. A large one takes far more, a small one less.
ROOM = 32 << 20


def confine(pids: list[int], limit: int) -> None:
    for pid in pids:
        hard = resource.prlimit(pid, resource.RLIMIT_AS)[1]
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, hard))


def address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def learner(server: Server, connect, seed: int) -> tinker.TrainingClient:
    service: tinker.ServiceClient = connect(server)
    client = service.create_lora_training_client(BASE_ALIAS, rank=4, seed=seed).result()
    for future in steps(client, [SMALL]):
        future.result()
    return client


def steps(
    client: tinker.TrainingClient, batches: list[list[tinker.Datum]]
) -> list[tinker.APIFuture[Any]]:
    """What is still to come of so many steps."""
    futures: list[tinker.APIFuture[Any]] = []
    for batch in batches:
        futures.append(client.forward_backward(batch, "cross_entropy"))
        futures.append(client.optim_step(sdk_adam(STEP)))
    return futures


def train(server: Server, connect, batches: list[list[tinker.Datum]], room: int | None):
    """An adapter's factors after these steps, in processes that have so much room at first."""
    client = learner(server, connect, 1)
    family = engine_processes(server.pid)
    if room is not None:
        confine(family, max(map(address_space, family)) + room)
    for future in steps(client, batches):
        future.result()
    assert (set(engine_processes(server.pid)) == set(family)) == (room is None)
    return exported_factors(server, client, "end")


@pytest.mark.parametrize("mesh", [pytest.param("dp=1", marks=pytest.mark.slow), "dp=2"])
def test_memory_that_ran_out_once_is_a_pause(serve, connect, mesh: str):
    calm: Server = serve("--mesh", mesh, folder="calm")
    expected = train(calm, connect, [SMALL, LARGE, SMALL], None)
    short: Server = serve("--mesh", mesh, folder="short")
    assert_same_factors(train(short, connect, [SMALL, LARGE, SMALL], ROOM), expected)
    assert any("can't allocate memory" in line for line in short.log)


@pytest.mark.parametrize("mesh", ["dp=1", pytest.param("dp=2", marks=pytest.mark.slow)])
def test_what_always_takes_too_much_fails_alone(serve, connect, mesh: str):
    calm: Server = serve("--mesh", mesh, folder="calm")
    expected = train(calm, connect, [SMALL] * 6, None)
    short: Server = serve("--mesh", mesh, folder="short")
    greedy, modest = learner(short, connect, 2), learner(short, connect, 1)
    family = engine_processes(short.pid)
    limit = max(map(address_space, family)) + ROOM
    # Those that follow are forked off the same parent.
    confine([*family, *{parent_of(pid) for pid in family}], limit)
    failing = greedy.forward_backward(LARGE, "cross_entropy")
    for future in steps(modest, [SMALL] * 6):
        future.result()
    with pytest.raises(tinker.RequestFailedError, match="engine"):
        failing.result()
    assert_same_factors(exported_factors(short, modest, "end"), expected)
