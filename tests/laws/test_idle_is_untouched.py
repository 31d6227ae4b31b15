"""Law 2: an adapter without work keeps every bit; a retired one leaves nothing behind.

Faults that were planted and seen to fail here: decay of idle weights or of idle moments when
another adapter steps, a snapshot that shares the vector, an array given away that is the tensor.
"""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.types import (
    AdamParams,
    AdapterNotFound,
    AdapterSpec,
    ForwardBackward,
    Opening,
    OptimStep,
    Sample,
    SamplingParams,
)
from manylora.types.adapter_spec import DType
from tests.laws.tenants import (
    Tenant,
    assert_same_bits,
    assert_same_state,
    must,
    perturb,
    random_data,
    train,
)

pytestmark = pytest.mark.usefixtures("threads")
SPECS = {
    "idle": AdapterSpec(rank=4, dropout=0.2, seed=1),
    "busy": AdapterSpec(rank=4, dropout=0.2, seed=2),
    "head": AdapterSpec(rank=2, targets=("lm_head", "q_proj"), seed=3),
}


def backward(engine: Engine, names: Sequence[str], seed: int) -> None:
    works = []
    for name in names:
        data = random_data(np.random.default_rng([seed, len(name)]), 3)
        works.append(ForwardBackward(adapter=name, data=data))
    must(engine.forward_backward(works))


def step(engine: Engine, names: Sequence[str]) -> None:
    params = AdamParams(lr=1e-2, weight_decay=0.1)
    must(engine.optim_step([OptimStep(adapter=name, params=params) for name in names]))


@pytest.fixture
def engine(tiny) -> Engine:
    engine = Engine(Opening(str(tiny("llama")), token_budget=128))
    for name, spec in SPECS.items():
        engine.create(name, spec)
        perturb(engine, name)
    return engine


@pytest.mark.parametrize("pending", [False, True])
def test_an_idle_adapter_keeps_every_bit(engine: Engine, pending: bool):
    """Also the gradient that it has pending, which is stepped later to the same effect."""
    backward(engine, ["idle"], 0)
    step(engine, ["idle"])
    if pending:
        backward(engine, ["idle"], 1)
    before = engine.state("idle")
    for number in range(3):
        backward(engine, ["busy", "head"], number)
        step(engine, ["busy", "head"])
        engine.create("guest", AdapterSpec(rank=9))
        backward(engine, ["guest"], number)
        engine.unload("guest")
        prompts = [[5, 6, 7]]
        must(
            engine.sample(
                [Sample(adapter="busy", prompts=prompts), Sample(adapter=None, prompts=prompts)]
            )
        )
    assert (before.grad is not None) == pending
    assert_same_state(before, engine.state("idle"))
    assert engine.adapters["busy"].step == 3


def test_reading_does_not_change_what_is_read(engine: Engine):
    """forward, sample, snapshot and state leave the adapter itself alone, its draws included."""
    backward(engine, ["idle"], 0)
    before = engine.state("idle")
    data = random_data(np.random.default_rng(5), 3)
    first, second = must(
        engine.forward_backward([ForwardBackward(adapter="idle", data=data, backward=False)] * 2)
    )
    assert all(map(np.array_equal, first.logprobs, second.logprobs))
    params = SamplingParams(temperature=1.0, max_tokens=4, stop=())
    must(engine.sample([Sample(adapter="idle", prompts=[[3, 4]], params=params)]))
    engine.snapshot("idle", "frozen")
    assert_same_state(before, engine.state("idle"))


@pytest.mark.parametrize("same_shape", [True, False])
def test_a_retired_name_starts_clean(tiny, same_shape: bool):
    """The second life of a name has the numbers of a first."""
    tenant = Tenant(name="again", spec=AdapterSpec(rank=5, dropout=0.1, seed=9))
    shape: dict[str, Any] = {} if same_shape else {"rank": 2, "targets": ("q_proj", "lm_head")}
    other = replace(tenant, spec=replace(tenant.spec, seed=4, **shape))
    fresh = train(Engine(Opening(str(tiny("llama")))), [tenant], 3)["again"]
    used = Engine(Opening(str(tiny("llama"))))
    train(used, [other], 2)
    used.create("again", other.spec)
    perturb(used, "again")
    backward(used, ["again"], 0)  # leaves with a gradient that was never stepped,
    outcome = used.forward_backward([ForwardBackward(adapter="again", data=[], loss="nonsense")])
    assert isinstance(outcome[0], Exception)  # and poisoned
    used.unload("again")
    assert_same_bits(fresh, train(used, [tenant], 3)["again"])


def test_a_snapshot_goes_on_serving_old_weights(engine: Engine):
    request = Sample(
        adapter="busy", prompts=[[5, 6, 7]], params=SamplingParams(max_tokens=6, stop=())
    )
    frozen = replace(request, snapshot="frozen")
    engine.snapshot("busy", "frozen")
    (before,) = must(engine.sample([request]))[0].sequences
    for number in range(4):
        backward(engine, ["busy"], number)
        step(engine, ["busy"])
    now, then = (r.sequences[0] for r in must(engine.sample([request, frozen])))
    assert then == before  # to the bit
    assert not np.allclose(now.logprobs, before.logprobs, atol=1e-3)
    engine.unload("busy")
    assert must(engine.sample([frozen]))[0].sequences == (before,)
    engine.drop_snapshot("frozen")
    assert isinstance(engine.sample([frozen])[0], AdapterNotFound)


def test_unloading_frees_every_tensor(engine: Engine):
    backward(engine, ["busy"], 0)
    step(engine, ["busy"])
    must(engine.sample([Sample(adapter="busy", prompts=[[5, 6]])]))
    adapter = engine.adapters["busy"]
    grad_P, moments = adapter.require_grad(), adapter.require_moments()
    gone: list[weakref.ref] = [
        weakref.ref(tensor) for tensor in (adapter.master_P, grad_P, *moments)
    ]
    gone.append(weakref.ref(adapter))
    del adapter, grad_P, moments
    engine.unload("busy")
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_snapshots_state_and_a_base_weight_are_detached(engine: Engine, dtype: DType):
    engine.create("other", AdapterSpec(rank=2, dtype=dtype, seed=8))
    engine.snapshot("other", "frozen")
    state = engine.snapshot_state("frozen")
    kept = state.weights.copy()
    state.weights.fill(0)
    assert np.array_equal(engine.snapshot_state("frozen").weights, kept)
    state.weights[:] = kept
    engine.install_snapshot("again", state)
    state.weights.fill(0)
    assert np.array_equal(engine.snapshot_state("again").weights, kept)
    weight_NK = engine.base_weight("lm_head")
    copy_NK = weight_NK.copy()
    weight_NK.fill(0)
    assert copy_NK.any() and np.array_equal(engine.base_weight("lm_head"), copy_NK)


def test_a_state_is_detached(engine: Engine):
    """What `state` gave does not follow the adapter, nor the adapter what it was restored from."""
    backward(engine, ["busy"], 0)
    state = engine.state("busy")
    kept = {k: getattr(state, k).copy() for k in ("weights", "grad")}
    step(engine, ["busy"])
    assert np.array_equal(state.weights, kept["weights"])
    assert state.grad is not None and np.array_equal(state.grad, kept["grad"])
    engine.restore("copy", state)
    state.weights.fill(0)
    step(engine, ["copy"])
    assert_same_state(engine.state("busy"), engine.state("copy"))
