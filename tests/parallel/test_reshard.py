"""A state made on any mesh goes on on any other: weights, moments, and gradients half summed.

Exports are those that one process writes of the same state, to the byte.

Faults that were planted and seen to fail here: moments of one slice only, moments not restored,
terms of the other tp ranks left out of a pending gradient.
"""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.lora.state import AdapterState
from manylora.parallel import Mesh
from manylora.types import Opening, OptimStep, StepRefused
from tests.laws.tenants import must
from tests.parallel.processes import run_ranks
from tests.parallel.training import (
    as_json,
    assert_replicas,
    assert_same_numbers,
    crowd,
    join,
    load,
    save,
    works_of,
)

FOUR = {"num_key_value_heads": 4}
CHAIN = ["dp=2,tp=2", "dp=1", "tp=4", "dp=4", "dp=2,tp=2", "tp=2", "dp=2", "dp=1"]
SLOW = [pytest.param(shape, marks=pytest.mark.slow) for shape in ("dp=4", "tp=4")]
HALF = {"half", "sixteen"}
POISONED = "wide"


def one_leg(mesh: Mesh, folder: str, number: int, before: str | None, after: str) -> Any:
    """Go on where the last mesh stopped: a call, a step, and a call whose step is the next's."""
    engine = Engine(Opening(str(folder), token_budget=64, device="cpu"), mesh)
    tenants = crowd(exact=True)
    loaded: dict[str, Any] = {}
    if before is None:
        for tenant in tenants:
            join(engine, tenant)
    else:
        load(engine, before)
        loaded = states_of(engine)
        works = [w for t in tenants if t.name != "idle" for w in t.works(3 * number % 5 + 1)]
        must(engine.forward_backward(works))
        assert_replicas(mesh, engine)
        refused = {name for name, adapter in engine.adapters.items() if adapter.poison}
        assert refused == ({POISONED} if number % 2 == 0 else set())
        due = [t for t in tenants if engine.adapters[t.name].has_grad]
        steps = [OptimStep(adapter=t.name, params=t.params) for t in due]
        for step, outcome in zip(steps, engine.optim_step(steps), strict=True):
            assert isinstance(outcome, StepRefused) == (step.adapter in refused), outcome
    must(engine.forward_backward(works_of(tenants[::2], 2 * number)))
    if number % 2:
        engine.poison(POISONED, f"on leg {number}")
    assert_replicas(mesh, engine)
    save(mesh, engine, after)
    left = states_of(engine)
    return {"loaded": loaded, "left": left} if mesh.is_leader else None


def states_of(engine: Engine) -> dict[str, Any]:
    return {name: as_json(engine.state(name)) for name in sorted(engine.adapters)}


def exported(mesh: Mesh, folder: str, kept: str, to: str) -> None:
    """Write again what `save` wrote."""
    engine = Engine(Opening(str(folder), token_budget=64, device="cpu"), mesh)
    load(engine, kept)
    save(mesh, engine, to)


@lru_cache
def chain(folder: Path, name: str, shapes: tuple[str, ...]) -> list[Any]:
    kept = [None, *(f"{folder}-{name}-{number}" for number in range(len(shapes)))]
    return [
        run_ranks(one_leg, shape, str(folder), number, kept[number], kept[number + 1])[0]
        for number, shape in enumerate(shapes)
    ]


def test_what_a_mesh_leaves_is_what_the_next_one_loads(tiny):
    legs = chain(tiny("llama", **FOUR), "chain", tuple(CHAIN))
    pending = 0
    for number, (left, loaded) in enumerate(pairwise(legs)):
        assert left["left"].keys() == loaded["loaded"].keys()
        for name, state in left["left"].items():
            its, where = loaded["loaded"][name], f"{name} after leg {number}"
            grad_SP, its_SP = state.pop("grad"), its.pop("grad")
            assert_same_numbers(state, its, where)
            if name == POISONED and number % 2:
                assert state["poison"] is not None and grad_SP is None
            assert (grad_SP is None) == (its_SP is None), where
            if grad_SP is not None:
                pending += 1
                total = grad_SP.sum(0, dtype=np.float64)
                error = np.linalg.norm(its_SP.sum(0, dtype=np.float64) - total)
                assert error < 1e-6 * np.linalg.norm(total), where
    assert pending > len(CHAIN)


def test_the_chain_trains_as_one_process(tiny):
    folder = tiny("llama", **FOUR)
    moved = chain(folder, "chain", tuple(CHAIN))[-1]["left"]
    alone = chain(folder, "one", ("dp=1",) * len(CHAIN))[-1]["left"]
    for name in moved.keys() - HALF:
        assert moved[name]["step"] == alone[name]["step"] >= (0 if name == "idle" else 2)
        assert moved[name]["draws"] == alone[name]["draws"]
        for vector in ("weights", "exp_avg", "exp_avg_sq"):
            one, other = moved[name][vector], alone[name][vector]
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-4, err_msg=name)


def test_exports_are_those_of_one_process(tiny):
    folder = tiny("llama", **FOUR)
    chain(folder, "chain", tuple(CHAIN))
    compared = 0
    for number, shape in enumerate(CHAIN[:4]):
        kept, again = Path(f"{folder}-chain-{number}"), Path(f"{folder}-again-{number}")
        run_ranks(exported, "dp=1", str(folder), str(kept), str(again))
        for file in sorted(path for path in kept.rglob("*") if path.is_file()):
            its = again / file.relative_to(kept)
            if "peft" in file.parts and file.suffix in {".safetensors", ".json"}:
                assert file.read_bytes() == its.read_bytes(), f"{shape}: {file}"
                compared += 1
    assert compared >= 4 * 2 * len(crowd(exact=True))


def interrupted(mesh: Mesh, folder: str, stops: bool) -> Any:
    """Two calls and a step; between the calls all adapters may be put away and brought back."""
    engine = Engine(Opening(str(folder), token_budget=64, device="cpu"), mesh)
    tenants = crowd(exact=True)
    for tenant in tenants:
        join(engine, tenant)
        engine.snapshot(tenant.name, f"first {tenant.name}")
    found: dict[str, Any] = {}
    for number in range(2):
        must(engine.forward_backward(works_of(tenants, 3 * number)))
        if stops:
            away = {tenant.name: engine.state(tenant.name) for tenant in tenants}
            for name, state in away.items():
                engine.unload(name)
                # Where the first share goes depends on the name and must not show in bits.
                engine.restore(f"other {name}", state)
                engine.adapters[name] = engine.adapters.pop(f"other {name}")
                assert_same_states(engine.state(name), state)
        must(engine.forward_backward(works_of(tenants, 3 * number + 1)))
        steps = [OptimStep(adapter=t.name, params=t.params) for t in tenants]
        usable = [s for s in steps if engine.adapters[s.adapter].has_usable_grad]
        found[f"norms {number}"] = [r.grad_norm for r in must(engine.optim_step(usable))]
        assert_replicas(mesh, engine)
    found["states"] = states_of(engine)
    for tenant in tenants:
        # Snapshots are kept, and come back.
        first = engine.snapshot_state(f"first {tenant.name}")
        engine.drop_snapshot(f"first {tenant.name}")
        engine.install_snapshot("again", first)
        assert_same_states(engine.snapshot_state("again"), first)
        found[f"first {tenant.name}"] = first.weights
    return found if mesh.is_leader else None


def assert_same_states(one: AdapterState, other: AdapterState) -> None:
    assert_same_numbers(as_json(one), as_json(other))


@pytest.mark.parametrize("shape", ["dp=1", "dp=2", "tp=2", "dp=2,tp=2", *SLOW])
def test_half_summed_gradients_are_put_away_and_brought_back(tiny, shape: str):
    """To the bit, on the mesh that they come from, whichever rank becomes their home."""
    folder = tiny("llama", **FOUR)
    stopped = run_ranks(interrupted, shape, str(folder), True)[0]
    went_on = run_ranks(interrupted, shape, str(folder), False)[0]
    assert_same_numbers(stopped, went_on)
    one = run_ranks(interrupted, "dp=1", str(folder), False)[0]
    for name in (key for key in one if key.startswith("first")):
        assert np.array_equal(one[name], went_on[name]), name
