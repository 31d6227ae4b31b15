"""Eight tenants through kill -9, broken connections, duplicates and disorder: nothing is lost, and
everything is, to the last bit, what an undisturbed server gives."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from manylora.store import Store
from tests.family import engine_processes
from tests.wire.forked import ForkedServer
from tests.wire.server import Server
from tests.wire.tenants import RANKS, Luck, Seen, Tenant, everybody

STEPS = 8
PLANS = 4
# Far more than a run takes, so that a slow machine is not taken for a stuck future.
SECONDS = 240.0
FEW, MANY = 2, int(os.environ.get("MANYLORA_CHAOS_SEEDS", "50"))
MESHED = 10  # for each mesh
FIRST = int(os.environ.get("MANYLORA_CHAOS_FIRST", "0"))

_calm: dict[tuple[int, str], list[Seen]] = {}
ALONE = "dp=1"


def new_keys(folder: Path) -> list[str]:
    """A key of each of eight tenants."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store.in_folder(folder)
    try:
        return [store.keys.create(f"tenant{number}") for number in range(len(RANKS))]
    finally:
        store.close()


pytestmark = pytest.mark.usefixtures("nursery")


def undisturbed(plan: int, folder: Path, mesh: str) -> list[Seen]:
    """What the eight see of a server that nobody disturbs, one request at a time."""
    if (plan, mesh) not in _calm:
        keys = new_keys(folder)
        with ForkedServer(folder, "--mesh", mesh) as server:
            tenants = [
                Tenant(number, plan, lambda: server.port, key, Luck())
                for number, key in enumerate(keys)
            ]
            _calm[plan, mesh] = asyncio.run(everybody(tenants, STEPS, SECONDS))
    return _calm[plan, mesh]


async def shake(server: Server, draw: random.Random, kills: int) -> None:
    """Kill the server at any moment, even while it starts."""
    for _ in range(kills):
        await asyncio.sleep(draw.uniform(0.0, 2.5))
        await asyncio.to_thread(server.kill)
        if draw.random() < 0.25:
            await asyncio.to_thread(server.start_and_kill, draw.uniform(0.5, 5.0))
        await asyncio.to_thread(server.start)


async def shake_engine(server: Server, draw: random.Random, kills: int) -> None:
    """Kill one of the engine's processes at any moment, even while it starts."""
    for _ in range(kills):
        await asyncio.sleep(draw.uniform(0.0, 2.5))
        processes = engine_processes(server.pid)
        if processes:
            os.kill(draw.choice(processes), signal.SIGKILL)


def storm(seed: int, folder: Path, mesh: str) -> tuple[list[Seen], Server]:
    """What the eight see of a server that is shaken, or of one whose mesh is."""
    draw = random.Random(seed)
    every = draw.choice((1, 3, 8))
    options = [
        "--mesh",
        mesh,
        "--set",
        f"saving.every_steps={every}",
        "--set",
        "saving.every_seconds=0.5",
    ]
    if seed % 2:
        options += ["--max-resident", str(draw.choice((1, 2, 5)))]
    keys = new_keys(folder)
    with ForkedServer(folder, *options) as server:
        tenants = [
            Tenant(
                number, seed % PLANS, lambda: server.port, key,
                Luck(seed, window=draw.randint(1, 8), drop=draw.choice((0.0, 0.1, 0.3)),
                     repeat=draw.choice((0.0, 0.2)), late=0.3, slow=draw.choice((0.0, 0.2))),
            )
            for number, key in enumerate(keys)
        ]  # fmt: skip
        shaking = (shake if mesh == ALONE else shake_engine)(server, draw, draw.randint(1, 5))
        seen = asyncio.run(everybody(tenants, STEPS, SECONDS, shaking))
        unexpected = [line for line in server.log if "the engine was lost" not in line]
        assert not any("Traceback" in line or "traceback" in line for line in unexpected)
    return seen, server


def check(seed: int, folder: Path, mesh: str = ALONE) -> None:
    calm = undisturbed(seed % PLANS, folder / "calm", mesh)
    seen, server = storm(seed, folder / "shaken", mesh)
    assert server.num_kills >= (mesh == ALONE)
    for number, (one, other) in enumerate(zip(seen, calm, strict=True)):
        assert one.results.keys() == other.results.keys(), number
        for name, result in other.results.items():
            assert one.results[name] == result, f"tenant {number}: {name}"
        assert one.weights == other.weights, f"tenant {number}: its weights"


@pytest.mark.parametrize("seed", range(FEW))
def test_a_storm_changes_nothing(seed: int, tmp_path: Path):
    check(seed, tmp_path)


@pytest.mark.parametrize("mesh", ["tp=2", "replicas=2"])
def test_a_mesh_that_loses_its_processes_changes_nothing(mesh: str, tmp_path: Path):
    check(3, tmp_path, mesh)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(FIRST, FIRST + MANY))
def test_many_storms_change_nothing(seed: int, tmp_path: Path):
    check(seed, tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("mesh", ["dp=2", "tp=2", "replicas=2"])
@pytest.mark.parametrize("seed", range(MESHED))
def test_many_losses_of_a_mesh_change_nothing(seed: int, mesh: str, tmp_path: Path):
    check(seed, tmp_path, mesh)
