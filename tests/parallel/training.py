"""What ranks run in the tests of training: tenants with plans of work, on any mesh.

P parameters of an adapter, L of them on a rank.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manylora.engine import Engine
from manylora.hosting.state_files import read_state, write_peft, write_state
from manylora.lora.state import AdapterState
from manylora.parallel import Mesh
from manylora.types import AdamParams, AdapterSpec, ForwardBackward, OptimStep
from tests.laws.tenants import LOSSES, Tenant, must

# A round in which one tenant has one datum, so that most ranks have no token at all.
QUIET = 5
VECTORS = ("weights", "exp_avg", "exp_avg_sq", "grad")


def crowd(*, exact: bool = False) -> list[Tenant]:
    """Ranks 1, 3 and 16, other targets, losses, rhythms and amounts of work.

    Args:
        exact: half precision, too; its roundings make a difference in sums visible, so that only
            bits can be compared.
    """
    tenants = [
        Tenant(
            name="quiet",
            spec=AdapterSpec(
                rank=1, alpha=2, targets=("q_proj", "v_proj"), seed=1, init="gaussian"
            ),
            losses=("cross_entropy", "distillation"),
            num_data=1,
        ),
        Tenant(
            name="policy",
            spec=AdapterSpec(rank=3, alpha=5, targets=("q_proj", "down_proj"), seed=2),
            losses=("ppo", "gspo", "cispo", "importance_sampling"),
            calls=2,
            num_data=2,
            params=AdamParams(lr=1e-3, clip_norm=0.3),
        ),
        Tenant(
            name="wide",
            spec=AdapterSpec(rank=16, alpha=16, seed=3),
            losses=("cross_entropy", "distillation"),
            num_data=9,
            untrained=0.5,
            wanted=("trained", "all", "trained"),
        ),
        Tenant(
            name="head",
            spec=AdapterSpec(rank=3, alpha=4, targets=("o_proj", "lm_head"), seed=4),
            losses=("dro", "cross_entropy", "gspo", "distillation"),
            num_data=3,
            wanted=("trained", "trained", "all"),
            every=2,
            join=1,
            params=AdamParams(lr=2e-3, beta1=0.8, beta2=0.95, weight_decay=0.1),
        ),
        Tenant(
            name="dropped",
            spec=AdapterSpec(rank=4, targets=r"model\.layers\.[02]\..*(q|down)_proj", dropout=0.3),
            num_data=4,
            lengths=(1, 9),
        ),
        Tenant(name="slow", spec=AdapterSpec(rank=3, seed=7), num_data=1, every=3),
        Tenant(name="idle", spec=AdapterSpec(rank=2, seed=5), num_data=2, leave=2),
    ]
    if exact:
        half = AdapterSpec(rank=5, alpha=7, dtype="bf16", dropout=0.1, seed=6)
        tenants += [
            Tenant(name="half", spec=half, losses=tuple(LOSSES), num_data=6),
            Tenant(name="sixteen", spec=replace(half, dtype="fp16", rank=1), num_data=3, every=3),
        ]
    # So that rounding does not make a whole step of a gradient that is nearly nothing: where norms
    # are 10, sums in another order leave 1e-7 of difference in an element, of which lr/eps is seen.
    return [replace(one, params=replace(one.params, eps=1e-4)) for one in tenants]


def works_of(tenants: Sequence[Tenant], number: int) -> list[ForwardBackward]:
    """A round's operations. A tenant's are the same whoever else is there."""
    if number % QUIET == QUIET - 1:
        tenants = [tenant for tenant in tenants if tenant.name == "quiet"]
    works = []
    for tenant in tenants:
        works += tenant.works(number)
        if number % QUIET == 1:
            works += [replace(work, backward=False) for work in tenant.works(number)[:1]]
    return works


def perturbed(state: AdapterState, name: str) -> AdapterState:
    """The same away from B = 0, by numbers that depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    moved_P = state.weights + 0.05 * rng.normal(size=len(state.weights))
    return replace(state, weights=moved_P.astype(np.float32))


def join(engine: Engine, tenant: Tenant) -> None:
    """Create the tenant's adapter and move it away from B = 0."""
    engine.create(tenant.name, tenant.spec)
    state = engine.state(tenant.name)
    engine.unload(tenant.name)
    engine.restore(tenant.name, perturbed(state, tenant.name))


def steps_of(engine: Engine, tenants: Sequence[Tenant], number: int) -> list[OptimStep]:
    """The steps that end a round; of adapters that have learned something."""
    return [
        OptimStep(adapter=tenant.name, params=tenant.params)
        for tenant in tenants
        if tenant.steps(number) and engine.adapters[tenant.name].has_grad
    ]


def train(
    mesh: Mesh, engine: Engine, tenants: Sequence[Tenant], rounds: Sequence[int]
) -> dict[str, Any]:
    """Let all tenants train; what came out of it, the same on every rank.

    Gradients are [S, P], as states have them.
    """
    found: dict[str, Any] = {
        tenant.name: {"logprobs": [], "losses": [], "gradients": [], "norms": []}
        for tenant in tenants
    }
    for number in rounds:
        for tenant in tenants:
            if tenant.join == number:
                join(engine, tenant)
        works = works_of(tenants, number)
        for work, result in zip(works, must(engine.forward_backward(works)), strict=True):
            own = found[str(work.adapter)]
            own["logprobs"].append(np.concatenate([one.ravel() for one in result.logprobs]))
            own["losses"].append(result.loss)
        assert_replicas(mesh, engine)
        steps = steps_of(engine, tenants, number)
        for step in steps:
            grad_SP = engine.state(step.adapter).grad
            assert grad_SP is not None
            found[step.adapter]["gradients"].append(grad_SP)
        for step, result in zip(steps, must(engine.optim_step(steps)), strict=True):
            found[step.adapter]["norms"].append(result.grad_norm)
        assert_replicas(mesh, engine)
    for tenant in tenants:
        found[tenant.name]["end"] = as_json(engine.state(tenant.name))
    return found


def as_json(state: AdapterState) -> dict[str, Any]:
    """A state's numbers; its spec and layout are known."""
    fields = (*VECTORS, "step", "draws", "poison")
    return {field: getattr(state, field) for field in fields}


def save(mesh: Mesh, engine: Engine, folder: str) -> None:
    """Write every adapter's state and its PEFT files; the leader writes."""
    for name in sorted(engine.adapters):
        state = engine.state(name)
        if mesh.is_leader:
            write_state(engine, Path(folder, name), state, position=0)
            write_peft(engine, Path(folder, "peft", name), state)


def load(engine: Engine, folder: str) -> None:
    """Restore every adapter of a folder."""
    for place in sorted(Path(folder).iterdir()):
        if place.name != "peft":
            engine.restore(place.name, read_state(engine, place).state)


def assert_same_numbers(one: Any, other: Any, where: str = "") -> None:
    """Results of ranks are the same to the last bit, the signs of zeros aside."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_numbers(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_numbers(a, b, f"{where} {number}")
    elif isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray) and np.array_equal(one, other), where
    else:
        assert one == other, where


def assert_replicas(mesh: Mesh, engine: Engine) -> None:
    """Whatever several ranks have is the same on all of them, tensor by tensor."""
    for name, adapter in engine.adapters.items():
        home = -1 if adapter.home is None else adapter.home
        poison = zlib.crc32((adapter.poison or "").encode())
        numbers = (adapter.step, adapter.draws, adapter.shares, home, adapter.has_grad, poison)
        _assert_same(mesh.world.gather(torch.tensor(numbers)), f"{name}: counters")
        living_L = adapter.weights.weights_P
        _assert_same(mesh.dp.gather(living_L), f"{name}: weights over dp")
        front = mesh.tp.gather(living_L[: adapter.part.num_whole].clone())
        _assert_same(front, f"{name}: whole factors over tp")
        own_L = living_L[adapter.part.own] if mesh.dp.size > 1 else living_L
        assert torch.equal(adapter.master_P.to(living_L.dtype), own_L), f"{name}: not published"
        for moment in (adapter.exp_avg_P, adapter.exp_avg_sq_P):
            assert moment is None or moment.shape == adapter.master_P.shape
        if mesh.dp.size > 1:
            assert len(adapter.master_P) <= -(-adapter.part.longest // mesh.dp.size)


def _assert_same(copies: torch.Tensor, what: str) -> None:
    for copy in copies[1:]:
        assert torch.equal(copy, copies[0]), what
