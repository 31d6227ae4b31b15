"""Several engines on one host give what one gives, wherever an adapter lives."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.api import AdapterClient, AdapterHandle
from manylora.hosting import Host
from manylora.processes import EngineGroup
from manylora.types import AdapterNotFound, AdapterSpec, Datum, Opening, Sample, SamplingParams
from manylora.types.mesh_shape import MeshShape
from tests.laws.tenants import random_data
from tests.models import TinyBases

pytestmark = pytest.mark.usefixtures("threads")
NAMES = ("a", "b", "c", "d", "e")
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@contextmanager
def opened(
    base: Path, mesh: str, folder: Path | None = None, max_resident: int | None = None
) -> Iterator[Host]:
    """A mesh's engines in processes of their own, on one host."""
    opening = Opening(
        str(base),
        token_budget=64,
        dtype="fp32",
        device="cpu",
        threads=1,
        mesh=MeshShape.parse(mesh),
    )
    group = EngineGroup(opening, step_seconds=60.0)
    try:
        host = Host(group.open(), folder, token_budget=64, max_resident=max_resident)
        try:
            yield host
        finally:
            host.close(cancel=False)
    finally:
        group.close()


def batch(seed: int) -> list[Datum]:
    return random_data(np.random.default_rng(seed), 2)


def everything(host: Host) -> list[Any]:
    """Losses, steps and samples of adapters that come, train together, and go."""
    client = AdapterClient(host)
    handles = [client.create(name, rank=1 + n, seed=n) for n, name in enumerate(NAMES)]
    seen: list[Any] = []
    for number in range(3):
        seen += rounds(handles, number)
    snapshots = [handle.snapshot() for handle in handles]
    first = [snapshot.sample([[5, 6, 7]], GREEDY) for snapshot in snapshots]
    seen += rounds(handles, 3)
    later = [snapshot.sample([[5, 6, 7]], GREEDY) for snapshot in snapshots]
    for one, other in zip(first, later, strict=True):
        assert one.result().sequences == other.result().sequences
        seen.append(one.result().sequences[0].tokens)
    seen.append(client.sample([[5, 6, 7]], GREEDY).result().sequences[0].tokens)
    for handle in handles:
        handle.unload().result()
    # The name is free, and what is left of it is its snapshot.
    again = client.create("a", rank=2, seed=9)
    seen += rounds([again], 0)
    seen.append(snapshots[0].sample([[5, 6, 7]], GREEDY).result().sequences[0].tokens)
    for snapshot in snapshots:
        snapshot.drop().result()
    with pytest.raises(AdapterNotFound):
        snapshots[0].sample([[5, 6, 7]], GREEDY).result()
    return seen


def rounds(handles: list[AdapterHandle], seed: int) -> list[Any]:
    works = [handle.forward_backward(batch(seed)) for handle in handles]
    steps = [handle.optim_step(lr=1e-2, clip_norm=1.0) for handle in handles]
    return [(w.result().loss, s.result().grad_norm) for w, s in zip(works, steps, strict=True)]


@pytest.mark.parametrize(("one", "many"), [("dp=1", "replicas=3"), ("dp=2", "replicas=2,dp=2")])
def test_any_number_of_engines_gives_what_one_gives(tiny: TinyBases, one: str, many: str) -> None:
    with opened(tiny("llama"), one) as host:
        expected = everything(host)
    with opened(tiny("llama"), many) as host:
        assert everything(host) == expected


def test_adapters_live_where_fewest_are_and_where_they_were_made(tiny: TinyBases) -> None:
    with opened(tiny("llama"), "replicas=2") as host:
        client = AdapterClient(host)
        for number, name in enumerate(NAMES[:4]):
            client.create(name, rank=1, seed=number)
        held = [set(one.engine.adapters) for one in host.units]
        assert [len(names) for names in held] == [2, 2]
        for gone in held[0]:
            client.adapters[gone].unload().result()
        client.create("new", rank=1)
        assert set(host.units[0].engine.adapters) == {"new"}
        assert host.counts()["resident"] == 3
        assert host.resident("new").spec.rank == 1


def test_a_snapshot_is_made_where_its_adapter_lives_whoever_asked_for_it_before(
    tiny: TinyBases,
) -> None:
    with opened(tiny("llama"), "replicas=2") as host:
        client = AdapterClient(host)
        for number, name in enumerate(NAMES[:3], 1):
            client.create(name, rank=1)
            early = Sample(adapter=None, prompts=[[5]], params=GREEDY, snapshot=f"{name}@{number}")
            with pytest.raises(AdapterNotFound):
                host.submit(early).result()
            made = client.adapters[name].snapshot()
            assert len(made.sample([[5]], GREEDY).result().sequences) == 1
            assert len(host.submit(early).result().sequences) == 1


def test_all_engines_work_at_once(tiny: TinyBases) -> None:
    """What waits for one engine does not wait for the other."""
    with opened(tiny("llama"), "replicas=2") as host:
        together = threading.Barrier(2, timeout=30.0)
        calls = [host.call(name, lambda _: together.wait()) for name in ("a", "b")]
        assert sorted(call.result(60.0) for call in calls) == [0, 1]
        assert host.waiting("") == (0, 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param("dp=1", "replicas=2", marks=pytest.mark.slow), ("replicas=2", "dp=1")],
)
def test_states_and_snapshots_on_disk_are_found_by_whichever_engine(
    tiny: TinyBases, tmp_path: Path, before: str, after: str
) -> None:
    specs = {name: AdapterSpec(rank=1 + n, seed=n) for n, name in enumerate(NAMES)}

    def learn(host: Host, seed: int) -> list[Any]:
        client = AdapterClient(host)
        handles = [AdapterHandle(client, name, spec, 0) for name, spec in specs.items()]
        return rounds(handles, seed)

    def sampled(host: Host) -> list[Any]:
        asked = [
            host.submit(Sample(adapter=None, prompts=[[5, 6, 7]], params=GREEDY, snapshot=f"{n}@1"))
            for n in NAMES
        ]
        return [answer.result().sequences[0].tokens for answer in asked]

    with opened(tiny("llama"), before, tmp_path, max_resident=2) as host:
        for name, spec in specs.items():
            host.call(name, lambda pager, n=name, s=spec: pager.create(n, s)).result()
        learn(host, 0)
        for name in NAMES:
            made = f"{name}@1"
            host.snapshot(name, made).result()
        expected_samples = sampled(host)
        assert host.counts()["resident"] == 2
    with opened(tiny("llama"), after, tmp_path) as host:
        for name, spec in specs.items():
            host.call(name, lambda pager, n=name, s=spec: pager.register(n, s, 0)).result()
        assert sampled(host) == expected_samples
        found = learn(host, 1)
    with opened(tiny("llama"), "dp=1") as host:
        for name, spec in specs.items():
            host.call(name, lambda pager, n=name, s=spec: pager.create(n, s)).result()
        learn(host, 0)
        assert learn(host, 1) == found
