"""An engine on a Ray cluster of two nodes: its actors, their loss, their end, and what goes wrong.

Faults that were planted and seen to fail here: a launcher that does not watch its control process,
an unreachable address taken for a loss like any other. In tests/unit/processes: neighbours that are
torn, devices of one rank only, last words that are not heard, a limit that is not kept.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.processes import EngineGroup, RayClient, RemoteEngine, address_toward
from manylora.types import (
    AdamParams,
    AdapterSpec,
    BaseModelError,
    ConfigError,
    EngineLost,
    ForwardBackward,
    OptimStep,
)
from tests.family import below
from tests.laws.tenants import random_data
from tests.laws.tiny_runs import losses, make_base, make_run, summary, weights
from tests.models import TinyBases
from tests.parallel.ray_cluster import REPO, TwoNodes, kill, wait_for
from tests.parallel.ray_control import opening
from tests.parallel.test_train import NAMES, finished

SPEC = AdapterSpec(rank=3, alpha=6, seed=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def base(tiny: TinyBases) -> str:
    return str(tiny("llama"))


@contextmanager
def opened(cluster: TwoNodes, base: str, step_seconds: float = 60.0) -> Iterator[EngineGroup]:
    """Two processes, one on each node."""
    launcher = RayClient(cluster.address, place_seconds=30)
    host = address_toward(launcher.peer())
    group = EngineGroup(opening(base), step_seconds=step_seconds, start=launcher, host=host)
    yield group
    group.close()


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def learn(engine: RemoteEngine, steps: int = 2) -> list[Any]:
    """The log-probabilities of a few steps on the same data."""
    rng = np.random.default_rng(5)
    data = random_data(rng, 5)
    found = []
    for _ in range(steps):
        (result,) = engine.forward_backward([ForwardBackward(adapter="a", data=data)])
        assert not isinstance(result, Exception)
        found += result.logprobs
        engine.optim_step([OptimStep(adapter="a", params=AdamParams(lr=0.1))])
    return found


def test_an_actor_that_is_killed_costs_a_generation(cluster: TwoNodes, base: str) -> None:
    with opened(cluster, base) as group:
        told: list[str] = []
        engine = group.open(told.append)[0]
        places = cluster.actors()
        assert len(places) == 2 and len(set(places.values())) == 2, "one process on each node"
        engine.create("a", SPEC)
        before = learn(engine)
        assert not np.array_equal(before[0], before[5]), "the step changed something"

        kill(max(places))
        with pytest.raises(EngineLost):
            learn(engine)
        assert len(told) == 1 and engine.was_lost
        again = group.open()[0]
        assert len(cluster.actors()) == 2 and not set(cluster.actors()) & set(places), (
            "all of them were replaced"
        )
        again.create("a", SPEC)
        for one, other in zip(before, learn(again), strict=True):
            np.testing.assert_array_equal(one, other)
    wait_for(lambda: not cluster.actors())


def test_a_run_on_a_cluster_is_the_run_and_survives_its_actors(
    cluster: TwoNodes, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    outs = []
    for name, settings in (("local", {}), ("cluster", {"ray": cluster.address})):
        run = {**make_run(tmp_path / name, base), "mesh": "dp=2", **settings}
        finished(run, tmp_path / name, len(settings), lambda pid: cluster.actors())
        assert summary(run["out"])["status"] == "completed"
        outs.append(run["out"])
    for name in NAMES:
        assert weights(outs[0], name) == weights(outs[1], name)
        assert losses(outs[0], name) == losses(outs[1], name)
    wait_for(lambda: not cluster.actors())


@pytest.mark.slow
def test_a_process_that_takes_too_long_says_where_it_stood(cluster: TwoNodes, base: str) -> None:
    with opened(cluster, base, step_seconds=0.001) as group:
        engine = group.open()[0]
        with pytest.raises(EngineLost, match="too long"):
            for _ in range(100):
                engine.create("a", SPEC)
                learn(engine)
                engine.unload("a")
        assert "process 0:" in group.stacks() or "process 1:" in group.stacks()
        assert "member.py" in group.stacks()


@pytest.mark.slow
def test_a_launcher_that_is_killed_is_replaced(cluster: TwoNodes, base: str) -> None:
    with opened(cluster, base) as group:
        engine = group.open()[0]
        [launcher] = [pid for pid in below(os.getpid()) if "ray_launcher" in command_of(pid)]
        kill(launcher)
        wait_for(lambda: not cluster.actors())
        with pytest.raises(EngineLost):
            engine.create("a", SPEC)
        again = group.open()[0]
        again.create("a", SPEC)
        assert learn(again)


@pytest.mark.slow
def test_the_ranks_find_each_other(cluster: TwoNodes, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.parallel.ray_sum", cluster.address, str(tmp_path)],
        cwd=REPO, env=cluster.environment, check=True,
    )  # fmt: skip
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["total"] for one in told] == [11.0, 11.0]
    assert [one["RANK"] for one in told] == ["0", "1"]
    assert [one["LOCAL_RANK"] for one in told] == ["0", "0"]
    assert {one["MASTER_ADDR"] for one in told} == {address_toward(cluster.address.split(":")[0])}
    assert all(one["GLOO_SOCKET_IFNAME"] for one in told)


@pytest.mark.parametrize("victim", ["control", pytest.param("launcher", marks=pytest.mark.slow)])
def test_no_actor_outlives_its_control_process(cluster: TwoNodes, base: str, victim: str) -> None:
    control = subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.ray_control", "auto", base],
        cwd=REPO, env=cluster.environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert control.stdout is not None
        assert control.stdout.readline().strip() == "open, with", "the control process stays light"
        assert len(cluster.actors()) == 2
        children = Path(f"/proc/{control.pid}/task/{control.pid}/children").read_text().split()
        kill(control.pid if victim == "control" else int(children[0]))
        wait_for(lambda: not cluster.actors())
        wait_for(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))
    finally:
        control.kill()
        control.communicate()


def test_an_address_that_processes_cannot_reach_is_named(cluster: TwoNodes, base: str) -> None:
    launcher = RayClient(cluster.address)
    launcher.peer()
    group = EngineGroup(
        opening(base), step_seconds=60,
        start=lambda assignment: launcher(replace(assignment, address="127.0.0.1:1")),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"cannot reach .* 127\.0\.0\.1:1: .*engine_address"):
        group.open()[0]
    group.close()


def test_too_few_devices_are_named(cluster: TwoNodes, base: str) -> None:
    launcher = RayClient(cluster.address, place_seconds=1.0)
    launcher.peer()
    group = EngineGroup(opening(base, dp=3), step_seconds=60, start=launcher)
    with pytest.raises(ConfigError, match=r"of the 2 CPUs .* 2 are free, and 3 are needed"):
        group.open()[0]
    group.close()


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "nobody answers at 127.0.0.1:1"), ("here", "neither `auto` nor HOST:PORT")],
)
def test_a_cluster_that_is_not_there_is_named(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RayClient(address).peer()


@pytest.mark.slow
def test_a_machine_without_the_base_is_named(
    cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(cluster, "/nowhere") as group:
        monkeypatch.setattr("socket.gethostname", lambda: "the-control-process's")
        with pytest.raises(BaseModelError, match=r"process [01] on \S+: .*/nowhere"):
            group.open()[0]


def test_an_address_of_another_machine_cannot_be_listened_on(base: str) -> None:
    with pytest.raises(ConfigError, match=r"engine_address: 203\.0\.113\.1 cannot be listened on"):
        EngineGroup(opening(base), step_seconds=60, host="203.0.113.1")
