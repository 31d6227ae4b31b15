"""Temperature and entropy of the head's distributions, beside plain autograd and in company.

Faults that were planted and seen to fail here: a gradient without 1 / T, or without it for the
targets beyond the first; one temperature for all rows of a chunk; an entropy of the next row.

N tokens of a datum, V vocabulary, P parameters of an adapter.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from manylora.engine import Engine
from manylora.engine.reference import ReferenceEngine
from manylora.types import DataError, Datum, ForwardBackward, ForwardBackwardResult, Opening
from tests.laws.tenants import LOSSES, must, random_data, work_of
from tests.unit.engine.test_head_loss import (
    CAPPED,
    SCALED,
    SPECS,
    TOLERANCE,
    Outcome,
    chunks,
    crowd,
    run,
    works_of,
)

__all__ = ["chunks"]

pytestmark = pytest.mark.usefixtures("threads")
# Of the adapters in company; that of one is today's.
TEMPERATURES = {"all": 0.5, "beside": 1.0, "head": 2.5, "only-head": 0.7}


def assert_same(one: Outcome, other: Outcome) -> None:
    """Results, entropies and gradients have the same bits."""
    assert one[0].loss == other[0].loss
    assert all(map(np.array_equal, one[0].logprobs, other[0].logprobs))
    assert (one[0].entropies is None) == (other[0].entropies is None)
    assert all(map(np.array_equal, one[0].entropies or (), other[0].entropies or ()))
    assert torch.equal(one[1], other[1]) and one[1].any()


def run_in_company(engine: Engine, own: ForwardBackward) -> Outcome:
    """The operation's outcome between those of the other adapters, in the stream too: every loss,
    each adapter's temperature."""
    others = [
        [
            replace(work, temperature=TEMPERATURES[name], entropy=number % 2 == 0)
            for number, work in enumerate(works_of(name).values())
        ]
        for name in SPECS
        if name != own.adapter
    ]
    works = [*others[0], own, *others[1], *others[2]]
    for adapter in engine.adapters.values():
        adapter.drop_grad()
    results = must(engine.forward_backward(works))
    assert own.adapter is not None
    return results[len(others[0])], engine.adapters[own.adapter].require_grad().clone()


@pytest.mark.parametrize("name", ["all", "head"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", ["llama", CAPPED, SCALED])
@pytest.mark.usefixtures("chunks")
def test_in_company_it_is_autograds_and_its_own(tiny, family: str, loss: str, name: str):
    engine = crowd(tiny(family), token_budget=512)
    data = random_data(np.random.default_rng(8), 3, loss, (15, 40))
    assert (loss == "distillation") == any(datum.num_targets > 1 for datum in data)
    work = replace(work_of(name, loss, data), temperature=TEMPERATURES[name], entropy=True)
    found, found_P = run_in_company(engine, work)
    assert_same((found, found_P), run(engine, work))

    oracle = ReferenceEngine(tiny(family), engine.state(name))
    expected, total = oracle.forward_backward(
        work.data, work.loss, work.config, temperature=work.temperature
    )
    for row, wanted in zip(found.logprobs, expected, strict=True):
        np.testing.assert_allclose(row, wanted.numpy(), rtol=0, atol=TOLERANCE)
    # Terms of either sign nearly cancel, and each may be off by as much as its log-probability.
    assert found.loss == pytest.approx(total, rel=TOLERANCE, abs=TOLERANCE * work.num_tokens)
    expected_P = oracle.gradient()
    assert (found_P - expected_P).norm() <= TOLERANCE * expected_P.norm()
    assert_entropies(found, oracle, work)


def assert_entropies(
    found: ForwardBackwardResult, oracle: ReferenceEngine, work: ForwardBackward
) -> None:
    assert found.entropies is not None
    for number, (row_N, datum) in enumerate(zip(found.entropies, work.data, strict=True)):
        logprobs_NV = oracle.distributions(datum, work.temperature).double()
        expected_N = -(logprobs_NV.exp() * logprobs_NV).sum(dim=1).detach().numpy()
        if found.positions is not None:
            expected_N = expected_N[found.positions[number]]
        assert row_N.dtype == np.float32 and row_N.shape == expected_N.shape
        np.testing.assert_allclose(row_N, expected_N, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["beside", "head"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("chunks")
def test_at_temperature_one_neighbours_change_no_bit(tiny, loss: str, name: str):
    """Not alone, not beside rows of other temperatures in its own chunks, not with an entropy."""
    engine = crowd(tiny("llama"), token_budget=512)
    work = works_of(name)[loss]
    alone, alone_P = run(engine, work)
    found, found_P = run_in_company(engine, work)
    assert_same((found, found_P), (alone, alone_P))
    assert found.entropies is None
    asked, asked_P = run_in_company(engine, replace(work, entropy=True))
    assert asked.entropies is not None
    assert_same((replace(asked, entropies=None), asked_P), (alone, alone_P))


@pytest.mark.parametrize("loss", ["ppo", "distillation", "gspo"])
@pytest.mark.usefixtures("chunks")
def test_entropies_are_of_the_positions_that_are_reported(tiny, loss: str):
    engine = crowd(tiny("llama"))
    data = random_data(np.random.default_rng(5), 3, loss, (15, 40))
    untrained = []
    for datum in data:
        keep = np.arange(len(datum)) % 3 == 0
        inputs = dict(datum.loss_inputs)
        for key in {"weights", "advantages", "sequence_ratio_mask"} & set(inputs):
            kept = keep if inputs[key].ndim == 1 else keep[:, None]
            inputs[key] = np.where(kept, inputs[key], 0)
        if "sequence_ratio_mask" in inputs:
            inputs["sequence_ratio_mask"][0] = 1
        untrained.append(replace(datum, loss_inputs=inputs))
    everything = replace(work_of("all", loss, untrained), temperature=0.8, entropy=True)
    trained = replace(everything, logprobs="trained")
    whole, whole_P = run_in_company(engine, everything)
    part, part_P = run_in_company(engine, trained)
    assert torch.equal(whole_P, part_P)
    assert whole.entropies is not None and part.entropies is not None
    assert part.positions is not None
    for all_N, some_n, places_n in zip(
        whole.entropies, part.entropies, part.positions, strict=True
    ):
        assert 0 < len(some_n) < len(all_N)
        assert np.array_equal(all_N[places_n], some_n)
    oracle = ReferenceEngine(tiny("llama"), engine.state("all"))
    assert_entropies(whole, oracle, everything)


def test_without_a_gradient_and_very_cold(tiny):
    """At T = 0.01 most exponentials are 0, which have no part in the entropy."""
    engine = crowd(tiny("llama"))
    work = replace(works_of("all")["cross_entropy"], backward=False, temperature=0.01, entropy=True)
    (found,) = must(engine.forward_backward([work]))
    oracle = ReferenceEngine(tiny("llama"), engine.state("all"))
    assert found.entropies is not None
    for row_N, datum in zip(found.entropies, work.data, strict=True):
        logprobs_NV = oracle.distributions(datum, 0.01).double()
        expected_N = -(logprobs_NV.exp() * logprobs_NV).sum(dim=1).detach().numpy()
        # A logit's rounding, 1e-7, is a hundred times that here.
        np.testing.assert_allclose(row_N, expected_N, rtol=0, atol=1e-3)
        assert row_N.min() >= -1e-6


@pytest.mark.parametrize(
    "temperature", [0, 0.0, -1.0, float("nan"), float("inf"), 1e-60, 10**400, True, "1", None]
)
def test_a_temperature_that_is_none_is_refused(tiny, temperature: Any):
    engine = crowd(tiny("llama"))
    work = replace(works_of("all")["ppo"], temperature=temperature)
    fine = works_of("head")["ppo"]
    error, neighbour = engine.forward_backward([work, fine])
    assert isinstance(error, DataError)
    assert "adapter 'all': temperature is" in str(error) and repr(temperature) in str(error)
    assert must([neighbour])


def test_uniform_logits_have_the_entropy_of_the_vocabulary(tiny):
    engine = Engine(Opening(str(tiny("llama"))))
    engine.base.head.weight_VH.zero_()
    engine.create("all", SPECS["beside"])
    tokens = np.arange(1, 9)
    datum = Datum(tokens, {"target_tokens": tokens, "weights": np.ones(8)})
    work = ForwardBackward(
        adapter="all", data=[datum], backward=False, temperature=3.0, entropy=True
    )
    (found,) = must(engine.forward_backward([work]))
    assert found.entropies is not None
    np.testing.assert_allclose(found.entropies[0], np.log(engine.base.vocab_size), rtol=1e-6)
