"""The gradient of an optimizer step is that of the formulas, for every combination of settings.

Faults that were planted and seen to fail here: advantages of the neighbouring group, a standard
deviation of n, the loss divided by each datum's own tokens, rejected tokens in the denominator, a
temperature of 1 whatever was asked.
"""

import itertools
from typing import Any

import pytest

from manylora.config import RlSettings
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rollout import SampleGroup
from tests.unit.runs.rl.toy_policy import (
    ToyPolicy,
    expected_gradient,
    gradient,
    minibatches_of,
    relative_error,
    settings,
    some_groups,
    toy_policy,
)

ADVANTAGES: list[dict[str, Any]] = [
    {"kind": kind, "scale": scale}
    for kind in ("grpo", "rloo", "dr_grpo")
    for scale in ("group", "batch", "none")
]
LOSSES: dict[str, dict[str, Any]] = {
    "ppo": {"clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"clip_low": 0.2, "clip_high": 0.1},
    "gspo": {"clip_low": 0.05, "clip_high": 0.05},
    "importance_sampling": {},
    "dro": {"beta": 0.3},
}
CORRECTIONS: list[dict[str, Any]] = [
    {"correct": "token_truncate", "max": 1.1},
    {"correct": "token_mask", "max": 1.4, "min": 0.7},
    {"correct": "sequence_truncate", "max": 1.2},
    {"correct": "sequence_mask", "max": 1.6, "min": 0.6},
    {"correct": "none"},
]
PROXIMALS = ("recompute", "behavior")
AGGREGATES = ("tokens", "sequences", "constant")
DIVERGENCES: list[dict[str, Any]] = [
    {},
    *({"coef": 0.3, "where": "loss", "estimator": one} for one in ("k1", "k2", "k3")),
    {"coef": 0.3, "where": "reward"},
]
OVERLONG = {"buffer": 4, "penalty": 0.5, "mask_truncated": True}
START = toy_policy(1)
REFERENCE = START.moved(5, 0.3)
TEMPERATURE = 1.3


def combined(
    kind: str,
    correction: dict[str, Any],
    proximal: str,
    aggregate: str,
    divergence: dict[str, Any],
    advantage: dict[str, Any],
    **loss: Any,
) -> RlSettings:
    return settings(
        advantage=advantage,
        loss={"kind": kind, **LOSSES[kind], "aggregate": aggregate, **loss},
        kl=divergence,
        off_policy={**correction, "proximal": proximal},
        overlong=OVERLONG,
    )


def allowed(kind: str, divergence: dict[str, Any]) -> bool:
    """dro has a pull of its own in the loss."""
    return not (kind == "dro" and divergence.get("where") == "loss")


def worst(rl: RlSettings, groups: list[SampleGroup], policy: ToyPolicy) -> float:
    """The largest error of any of a step's gradients."""
    objective = Objective(rl)
    minibatches = minibatches_of(objective, objective.batch(groups), START, REFERENCE)
    assert len(minibatches) == rl.loss.minibatches
    errors: list[float] = []
    for number, minibatch in enumerate(minibatches):
        expected_P = expected_gradient(rl, groups, number, policy, START, REFERENCE)
        errors.append(relative_error(gradient(objective, minibatch.data, policy), expected_P))
    return max(errors)


@pytest.mark.parametrize("proximal", PROXIMALS)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda one: one["correct"])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_the_formulas(kind: str, correction: dict[str, Any], proximal: str):
    """Two minibatches of a later pass, where the policy has moved on and bounds act."""
    policy, advantages = START.moved(9, 0.15), itertools.cycle(ADVANTAGES)
    for number, (aggregate, divergence) in enumerate(itertools.product(AGGREGATES, DIVERGENCES)):
        if not allowed(kind, divergence):
            continue
        rl = combined(
            kind, correction, proximal, aggregate, divergence, next(advantages), minibatches=2
        )
        groups = some_groups(20 + number, START, TEMPERATURE)
        assert worst(rl, groups, policy) <= 1e-5, rl


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ADVANTAGES, ids=lambda one: "-".join(one.values()))
def test_gradients_of_every_combination(advantage: dict[str, Any]):
    policy, groups = START.moved(9, 0.15), some_groups(7, START, TEMPERATURE)
    options = LOSSES, CORRECTIONS, PROXIMALS, AGGREGATES, DIVERGENCES
    for kind, correction, proximal, aggregate, divergence in itertools.product(*options):
        if allowed(kind, divergence):
            rl = combined(
                kind, correction, proximal, aggregate, divergence, advantage, minibatches=2
            )
            assert worst(rl, groups, policy) <= 1e-5, rl


@pytest.mark.parametrize("correction", [CORRECTIONS[0], CORRECTIONS[-1]])
@pytest.mark.parametrize("kind", ["ppo", "cispo", "importance_sampling"])
def test_a_single_step_needs_no_pass_before_it(kind: str, correction: dict[str, Any]):
    """Both ways, without and with the pass, give the gradient of the formulas."""
    for aggregate, divergence in itertools.product(AGGREGATES, DIVERGENCES[:-1]):
        groups = some_groups(3, START, TEMPERATURE)
        alone, twice = (
            combined(
                kind, correction, "recompute", aggregate, divergence, ADVANTAGES[0], updates=number
            )
            for number in (1, 2)
        )
        assert not Objective(alone).needs_proximal
        assert Objective(twice).needs_proximal
        assert Objective(alone).loss == "cispo"
        for rl in (alone, twice):
            assert worst(rl, groups, START) <= 1e-5, rl


@pytest.mark.parametrize(
    "given",
    [
        {"loss": {"kind": "gspo", **LOSSES["gspo"]}},
        {"loss": {"kind": "dro", "beta": 0.1}},
        {"loss": {"updates": 2}},
        {"loss": {"minibatches": 2}},
        {"off_policy": {"correct": "token_mask"}},
        {"off_policy": {"correct": "sequence_truncate"}},
        {"kl": {"coef": 0.1, "where": "reward"}},
    ],
)
def test_other_steps_need_it(given: dict[str, Any]):
    rl = settings(**given)
    assert Objective(rl).needs_proximal
    behavior = {**given.get("off_policy", {}), "proximal": "behavior"}
    assert not Objective(settings(**{**given, "off_policy": behavior})).needs_proximal


def test_the_engine_is_told_its_own_names():
    ppo = Objective(settings(loss={"kind": "ppo", "updates": 2}, kl={"coef": 0.1}))
    assert ppo.loss == "ppo"
    assert ppo.config == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
        "kl_estimator": 3.0,
    }
    alone = Objective(settings(off_policy={"max": 3.0}))
    assert (alone.loss, alone.config) == (
        "cispo",
        {"clip_low_threshold": 0.0, "clip_high_threshold": 3.0},
    )
    assert alone.temperature == TEMPERATURE
    assert not alone.needs_reference


def test_the_formula_has_the_numbers_of_the_run():
    dapo = settings(preset="dapo", loss={"updates": 2}, off_policy={"max": 2.0})
    assert Objective(dapo).formula() == (
        "loss = mean over tokens of -min(exp(l - p)·A, clip(exp(l - p), 0.8, 1.28)·A); "
        "A = min(exp(p - q), 2)·(R - mean) / (std of the group + 1e-06); T = 1.3"
    )
    assert Objective(settings(preset="grpo", loss={"aggregate": "constant"})).formula() == (
        "loss = sum / (samples · 9) of -min(exp(l - q), 2)·A·l "
        "+ 0.04·(exp(base - l) - (base - l) - 1); A = (R - mean) / (std of the group + 1e-06); "
        "T = 1.3"
    )
