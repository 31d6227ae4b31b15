"""Forwards of the bare base and of snapshots: right, to the bit, and beside everybody's work.

Faults that were planted and seen to fail here: the living weights for a snapshot; snapshots of one
batch that page each other out.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manylora import Trainer
from manylora.engine import Engine
from manylora.hosting.pager import Pager
from manylora.scheduler import Residency
from manylora.types import (
    AdamParams,
    AdapterNotFound,
    AdapterSpec,
    DataError,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    NotFinite,
    Opening,
    OptimStep,
)
from tests.laws.tenants import must, perturb, random_data

pytestmark = pytest.mark.usefixtures("threads")
SPECS = {
    "one": AdapterSpec(rank=1, alpha=2.0, seed=1),
    "dropping": AdapterSpec(rank=5, alpha=8.0, seed=2, dropout=0.4),
    "head": AdapterSpec(rank=3, targets=("q_proj", "lm_head"), seed=3),
}


def batch(seed: int, loss: str = "cross_entropy") -> list[Datum]:
    return random_data(np.random.default_rng(seed), 3, loss, (5, 40))


def assert_same(one: ForwardBackwardResult, other: ForwardBackwardResult) -> None:
    assert one.loss == other.loss
    assert all(map(np.array_equal, one.logprobs, other.logprobs))
    assert all(map(np.array_equal, one.entropies or (), other.entropies or ()))


# --- through the engine -----------------------------------------------------------------------


@pytest.fixture
def engine(tiny) -> Engine:
    engine = Engine(Opening(str(tiny("llama")), token_budget=256))
    for name, spec in SPECS.items():
        engine.create(name, spec)
        perturb(engine, name)
        engine.snapshot(name, f"{name}@1")
    return engine


def move(engine: Engine, name: str, seed: int) -> None:
    must(engine.forward_backward([ForwardBackward(adapter=name, data=batch(seed))]))
    must(engine.optim_step([OptimStep(adapter=name, params=AdamParams(lr=0.05))]))


def frozen(snapshot: str | None, seed: int, **settings: Any) -> ForwardBackward:
    work = ForwardBackward(adapter=None, data=batch(seed), backward=False, snapshot=snapshot)
    return replace(work, **settings)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_bare_base_is_transformers(engine: Engine, tiny, temperature: float):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), attn_implementation="eager")
    work = frozen(None, 1, temperature=temperature)
    (found,) = must(engine.forward_backward([work]))
    for row_N, datum in zip(found.logprobs, work.data, strict=True):
        with torch.no_grad():
            logits_NV = model(input_ids=torch.from_numpy(datum.tokens)[None]).logits[0]
        targets_N1 = torch.from_numpy(datum.loss_inputs["target_tokens"])[:, None]
        expected_N = torch.log_softmax(logits_NV.float() / temperature, dim=-1).gather(
            1, targets_N1
        )
        np.testing.assert_allclose(row_N, expected_N[:, 0].numpy(), rtol=0, atol=1e-5)


def test_in_one_call_with_everybodys_work_each_has_its_own_bits(engine: Engine):
    """Frozen weights of every kind beside forwards and gradients of the living ones."""
    wanted = [frozen(name, 7, entropy=True) for name in (None, *(f"{name}@1" for name in SPECS))]
    alone = [must(engine.forward_backward([work]))[0] for work in wanted]
    for name in SPECS:
        move(engine, name, 3)
    own = [ForwardBackward(adapter=name, data=batch(5)) for name in SPECS]
    read = [replace(work, backward=False) for work in own]
    draws = {name: engine.adapters[name].draws for name in SPECS}

    def trained(*others: ForwardBackward) -> dict[str, torch.Tensor]:
        for name, adapter in engine.adapters.items():
            adapter.drop_grad()
            adapter.draws = draws[name]
        results = must(engine.forward_backward([*own, *others]))
        for found, expected in zip(results[len(own) :], alone if others else [], strict=False):
            assert_same(found, expected)
        return {name: adapter.require_grad().clone() for name, adapter in engine.adapters.items()}

    expected_P, found_P = trained(), trained(*wanted, *read)
    for name in SPECS:
        assert torch.equal(found_P[name], expected_P[name]) and found_P[name].any()
        # Forwards take nothing from the streams of random numbers.
        assert engine.adapters[name].draws == draws[name] + 1
    assert len({result.loss for result in alone}) == len(alone)


def test_a_snapshot_has_neither_dropout_nor_later_steps(engine: Engine):
    work = ForwardBackward(adapter="dropping", data=batch(4), backward=False)
    (then,) = must(engine.forward_backward([work]))
    move(engine, "dropping", 1)
    (now,) = must(engine.forward_backward([work]))
    (found,) = must(engine.forward_backward([replace(work, snapshot="dropping@1")]))
    assert_same(found, then)
    assert now.loss != then.loss


@pytest.mark.parametrize(
    ("work", "kind", "words"),
    [
        (frozen("gone", 1), AdapterNotFound, "no snapshot named 'gone'"),
        (frozen("gone", 1, adapter="one"), AdapterNotFound, "no snapshot named 'gone'"),
        (frozen(None, 1, adapter="nobody"), AdapterNotFound, "no adapter named 'nobody'"),
        (frozen(None, 1, backward=True), DataError, "the bare base: it is frozen"),
        (frozen("one@1", 1, backward=True), DataError, "snapshot 'one@1': it is frozen"),
        (
            frozen("one@1", 1, backward=True, adapter="one"),
            DataError,
            "snapshot 'one@1': it is frozen and has no gradient; ask for a forward",
        ),
        (frozen(None, 1, loss="kl"), DataError, "the bare base: unknown loss 'kl'"),
        (frozen("one@1", 1, loss="ppo"), DataError, "snapshot 'one@1', datum 0: loss 'ppo' needs"),
    ],
)
def test_what_cannot_be_run_is_refused_alone(engine: Engine, work, kind, words: str):
    fine = [frozen(None, 2), ForwardBackward(adapter="head", data=batch(2))]
    error, *results = engine.forward_backward([work, *fine])
    assert isinstance(error, kind) and words in str(error)
    must(results)


def test_a_loss_that_is_not_finite_names_the_weights(engine: Engine):
    engine.snapshots["one@1"].weights_P.fill_(float("nan"))
    errors = engine.forward_backward([frozen("one@1", 1), frozen(None, 1)])
    assert isinstance(errors[0], NotFinite) and "snapshot 'one@1': the loss is" in str(errors[0])
    must(errors[1:])


# --- through the pager ------------------------------------------------------------------------


@pytest.fixture
def pager(tiny, tmp_path: Path) -> Iterator[Pager]:
    engine = Engine(Opening(str(tiny("llama")), token_budget=64))
    limits = {"adapters": Residency(max_count=1), "snapshots": Residency(max_count=1)}
    pager = Pager(engine, tmp_path, **limits, host_bytes=1 << 30)
    yield pager
    pager.close()


def test_the_pager_brings_all_snapshots_of_a_batch_in(pager: Pager):
    expected = {}
    for number, (name, spec) in enumerate(SPECS.items()):
        pager.create(name, spec)
        must(pager.forward_backward([ForwardBackward(adapter=name, data=batch(number), seq=1)]))
        must(pager.optim_step([OptimStep(adapter=name, params=AdamParams(lr=0.05), seq=2)]))
        pager.snapshot(name, f"{name}@1", 3)
        work = ForwardBackward(adapter=name, data=batch(8), backward=False, seq=4)
        (expected[name],) = must(pager.forward_backward([work]))
    assert len(pager.engine.snapshots) == 1 and list(pager.engine.adapters) == ["head"]
    works = [frozen(f"{name}@1", 8, adapter=name) for name in SPECS]
    for name, found in zip(SPECS, must(pager.forward_backward(works)), strict=True):
        assert_same(found, expected[name])
        assert pager.position(name) == 4
    assert list(pager.engine.adapters) == ["head"]  # nobody's living weights were needed
    pager.unload("one")
    again, gone, base = pager.forward_backward([*works[:1], frozen("one@2", 8), frozen(None, 8)])
    assert isinstance(again, ForwardBackwardResult) and isinstance(base, ForwardBackwardResult)
    assert_same(again, expected["one"])
    assert isinstance(gone, AdapterNotFound)
    pager.drop_snapshot("one@1")
    (gone,) = pager.forward_backward(works[:1])
    assert isinstance(gone, AdapterNotFound)


# --- through handles --------------------------------------------------------------------------


@pytest.fixture
def trainer(tiny):
    with Trainer(tiny("llama"), token_budget=128) as trainer:
        yield trainer


def test_a_snapshots_forward_is_the_adapters_own_at_that_moment(trainer):
    adapter = trainer.create("a", rank=4, dropout=0.3)
    other = trainer.create("b", rank=2)
    adapter.forward_backward(batch(1))
    adapter.optim_step(lr=0.05)
    snapshot, then = adapter.snapshot(), adapter.forward(batch(2), temperature=0.8, entropy=True)
    futures = []
    for number in range(4):
        for one in (adapter, other):
            one.forward_backward(batch(number))
            one.optim_step(lr=0.05)
        futures.append(snapshot.forward(batch(2), temperature=0.8, entropy=True))
        futures.append(trainer.forward(batch(2), temperature=0.8, entropy=True))
    found = [future.result() for future in futures]
    base = trainer.create("untouched", rank=1).forward(batch(2), temperature=0.8, entropy=True)
    for one in found[::2]:
        assert one.entropies is not None
        assert_same(one, then.result())
    for one in found[1::2]:
        assert_same(one, base.result())  # B = 0
    now = adapter.forward(batch(2), temperature=0.8).result()
    assert len({now.loss, then.result().loss, base.result().loss}) == 3


def test_a_dropped_snapshot_is_gone_and_one_outlives_its_adapter(trainer):
    adapter = trainer.create("a", rank=4)
    kept, dropped = adapter.snapshot(), adapter.snapshot()
    expected, before = adapter.forward(batch(1)), dropped.forward(batch(1))
    dropped.drop()
    after = dropped.forward(batch(1))
    adapter.unload()
    assert_same(before.result(), expected.result())
    assert isinstance(after.exception(), AdapterNotFound)
    assert_same(kept.forward(batch(1)).result(), expected.result())


def test_the_bare_base_stands_in_no_adapters_order(trainer):
    """It is answered while an adapter's lane is held up by a sample."""
    from manylora.types import SamplingParams

    adapter = trainer.create("a", rank=1)
    long = adapter.sample([[1, 2]], SamplingParams(max_tokens=120, stop=()), num_samples=64)
    behind = adapter.forward(batch(1))
    trainer.forward(batch(1)).result()
    assert not behind.done() or long.done()
    long.cancel()
    behind.result()
