"""The KL to a reference: each estimator in each loss of policies, beside autograd; who has none.

Faults that were planted and seen to fail here: the derivative of k3 with its sign turned; the KL
added to tokens without a weight; tokens with a weight for the KL alone left untrained.

N tokens of a datum, T tokens, P parameters of an adapter.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from manylora.engine.reference import ReferenceEngine, reference_loss
from manylora.losses import get_loss, loss_names
from manylora.losses.kl import ESTIMATORS, kl_to_reference
from manylora.types import DataError, Datum, ForwardBackward
from tests.laws.tenants import LOSSES, random_data, work_of
from tests.unit.engine.test_head_loss import TOLERANCE, assert_same, crowd, run, works_of
from tests.unit.losses.test_losses import POLICY, T, datum, inputs_of

POLICIES = ("importance_sampling", "ppo", "cispo", "gspo", "dro")


def test_the_losses_of_policies_take_it_and_no_other():
    assert {name for name in loss_names() if get_loss(name).held} == set(POLICIES)


@pytest.mark.parametrize(("estimator", "by_hand"), [(1.0, -0.5), (2.0, 0.125), (3.0, 0.1487213)])
def test_estimators_by_hand_and_by_finite_differences(estimator: float, by_hand: float):
    """l = -2, ref = -1.5: d = 0.5; k = -d, d²/2, exp(d) - d - 1."""
    l_1, reference_1 = torch.tensor([-2.0, -2.0]).double(), torch.tensor([-1.5, -2.0]).double()
    kl_1, slope_1 = kl_to_reference(l_1, reference_1, estimator)
    assert kl_1.tolist() == pytest.approx([by_hand, 0.0], abs=1e-7)
    above, below = (kl_to_reference(l_1 + h, reference_1, estimator)[0] for h in (1e-5, -1e-5))
    torch.testing.assert_close(slope_1, (above - below) / 2e-5, rtol=1e-7, atol=1e-9)


def test_close_to_the_reference_k3_keeps_its_digits():
    """In single precision exp(d) - d - 1 would be 0 for d = 1e-4; it is d²/2."""
    l_1, reference_1 = torch.tensor([0.0]), torch.tensor([1e-4])
    kl_1, slope_1 = kl_to_reference(l_1, reference_1, 3.0)
    assert float(slope_1) == pytest.approx(-1e-4, rel=1e-3)
    assert float(kl_1) == pytest.approx(5e-9, abs=8e-12)


@pytest.mark.parametrize("config", [{}, *({"kl_estimator": one} for one in ESTIMATORS)])
@pytest.mark.parametrize("name", POLICIES)
def test_the_derivative_is_autograds(name: str, config: dict[str, float]):
    logprobs_T, inputs = inputs_of(name)
    generator = torch.Generator().manual_seed(2)
    noise_T, weights_T = torch.randn(2, T, generator=generator, dtype=torch.float64)
    inputs["reference_logprobs"] = logprobs_T + noise_T
    inputs["kl_weights"] = torch.where(weights_T > 0.5, weights_T, 0.0)
    config = {**LOSSES[name], **config}
    loss = get_loss(name)
    made = {key: make(logprobs_T, inputs, [T]) for key, make in loss.sequence_inputs.items()}
    loss_T, slope_T = loss.function(logprobs_T, {**inputs, **made}, loss.settings(config))

    leaf_T = logprobs_T.clone().requires_grad_()
    expected_T = reference_loss(name, leaf_T, inputs, config)
    (expected_slope_T,) = torch.autograd.grad(expected_T.sum(), leaf_T)
    torch.testing.assert_close(loss_T, expected_T.detach())
    torch.testing.assert_close(slope_T, expected_slope_T)
    # Where nothing weighs it, a reference has no part, even one that overflows.
    without = {key: inputs[key] for key in inputs if "kl" not in key and "reference" not in key}
    inputs["reference_logprobs"] = torch.where(weights_T > 0.5, logprobs_T + noise_T, 1e6)
    found_T = loss.function(logprobs_T, {**inputs, **made}, loss.settings(config))
    plain_T = loss.function(logprobs_T, {**without, **made}, loss.settings(config))
    for found, plain in zip(found_T, plain_T, strict=True):
        assert torch.equal(found[weights_T <= 0.5], plain[weights_T <= 0.5])


def held(data: list[Datum], seed: int, share: float = 0.5) -> list[Datum]:
    """The data with a reference near the policy, and weights on about `share` of the tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for one in data:
        weights = rng.random(len(one)) * (rng.random(len(one)) < share)
        extra = {
            "reference_logprobs": rng.normal(-5.0, 0.3, len(one)),
            "kl_weights": weights,
        }
        found.append(replace(one, loss_inputs={**one.loss_inputs, **extra}))
    return found


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", POLICIES)
def test_through_the_engine_beside_those_without(tiny, monkeypatch, loss: str, estimator: float):
    monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, **__: 32)
    engine = crowd(tiny("llama"), token_budget=512)
    rng = np.random.default_rng(3)
    data = held(random_data(rng, 2, loss, (15, 40)), 4)
    sparse = []
    for one in data:  # nothing but the KL on most of the tokens
        inputs = dict(one.loss_inputs)
        inputs["advantages"] = np.where(np.arange(len(one)) % 4 == 0, inputs["advantages"], 0)
        sparse.append(replace(one, loss_inputs=inputs))
    work = replace(
        work_of("all", loss, sparse),
        config={**LOSSES[loss], "kl_estimator": estimator},
        logprobs="trained",
    )
    neighbours = [*works_of("head").values(), replace(work, adapter="beside")]
    alone = run(engine, work)
    assert_same(run(engine, work, *neighbours), alone)
    oracle = ReferenceEngine(tiny("llama"), engine.state("all"))
    expected, total = oracle.forward_backward(work.data, loss, work.config, "trained")
    for found_n, wanted_n in zip(alone[0].logprobs, expected, strict=True):
        np.testing.assert_allclose(found_n, wanted_n.numpy(), rtol=0, atol=TOLERANCE)
    assert alone[0].loss == pytest.approx(total, rel=TOLERANCE, abs=TOLERANCE * work.num_tokens)
    expected_P = oracle.gradient()
    assert (alone[1] - expected_P).norm() <= TOLERANCE * expected_P.norm()

    # An operation without it has the bits that it has alone, beside those with it.
    plain = works_of("head")[loss]
    assert_same(run(engine, plain, work, replace(work, adapter="beside")), run(engine, plain))


REFERENCE: dict[str, list] = {"reference_logprobs": [-1.0, -2.0], "kl_weights": [0.0, 0.1]}


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("ppo", {"kl_weights": [1, 1]}, "together or not at all; there is only 'kl_weights'"),
        ("dro", {"reference_logprobs": [1, 1]}, "there is only 'reference_logprobs'"),
        ("ppo", {**REFERENCE, "kl_weights": [np.nan, 1]}, "'kl_weights' is not finite: nan at [0]"),
        ("cispo", {**REFERENCE, "reference_logprobs": [0, -np.inf]}, "'reference_logprobs' is not"),
        ("ppo", {"mask": [1, 1]}, "target_tokens, logprobs, advantages, reference_logprobs, kl_we"),
    ],
)
def test_inputs_are_checked(name: str, inputs: dict[str, Any], message: str):
    with pytest.raises(DataError) as caught:
        get_loss(name).check(datum(**POLICY, **inputs))
    assert message in str(caught.value)
    get_loss(name).check(datum(**POLICY, **REFERENCE))


@pytest.mark.parametrize("estimator", [0.0, 4, 2.5, True, "3", float("nan")])
def test_an_estimator_is_one_of_three(estimator: Any):
    with pytest.raises(DataError, match="setting 'kl_estimator' of loss 'ppo' is"):
        get_loss("ppo").settings({"kl_estimator": estimator})
    assert get_loss("ppo").settings({"kl_estimator": 1})["kl_estimator"] == 1


def test_cross_entropy_has_none():
    with pytest.raises(DataError, match="has no input 'kl_weights'; it takes: target_tokens, wei"):
        get_loss("cross_entropy").check(datum(weights=[1.0, 1.0], **REFERENCE))
    with pytest.raises(DataError, match="no setting 'kl_estimator'; it takes: none"):
        get_loss("cross_entropy").settings({"kl_estimator": 3.0})


@pytest.mark.parametrize("name", POLICIES)
def test_a_protocol_without_it_refuses_it_as_ever(tiny, name: str):
    """What the service asks of the engine, word for word."""
    engine = crowd(tiny("llama"))
    rng = np.random.default_rng(5)
    plain = replace(work_of("all", name, random_data(rng, 1, name)), reference_kl=False)
    setting = replace(plain, config={**LOSSES[name], "kl_estimator": 3.0})
    inputs = replace(plain, data=held(list(plain.data), 6))
    fine, *errors = engine.forward_backward([plain, setting, inputs])
    assert not isinstance(fine, Exception)
    own = get_loss(name)
    takes = ", ".join(sorted({*own.defaults, *own.required})) or "none"
    assert str(errors[0]) == (
        f"adapter 'all': loss {name!r} has no setting 'kl_estimator'; it takes: {takes}"
    )
    takes = ", ".join(("target_tokens", *own.inputs))
    assert str(errors[1]) == (
        f"adapter 'all', datum 0: loss {name!r} has no input 'kl_weights'; it takes: {takes}"
    )
    assert isinstance(errors[0], DataError) and isinstance(errors[1], DataError)


def test_an_operation_takes_it_unless_it_says_otherwise():
    assert ForwardBackward(adapter="a", data=[]).reference_kl
