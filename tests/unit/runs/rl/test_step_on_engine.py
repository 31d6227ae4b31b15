"""A whole step on the engine leaves the weights that plain autograd and AdamW leave.

Two passes over two minibatches, of an adapter with B ≠ 0 on a base of three layers, another adapter
beside it. Faults that were planted and seen to fail here: p taken anew before each pass;
minibatches in another order; the reference with the adapter on it.

N tokens of a segment, P parameters of an adapter.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.config import RlSettings
from manylora.engine import Engine
from manylora.engine.reference import ReferenceEngine
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.step_reference import reference_step_loss
from manylora.types import AdamParams, AdapterSpec, Datum, ForwardBackward, Opening, OptimStep
from manylora.types.data import Array
from tests.laws.tenants import must, perturb
from tests.models import VOCAB
from tests.unit.runs.rl.toy_policy import ragged_groups, settings

pytestmark = pytest.mark.usefixtures("threads")
# Moments of a first step are the gradient itself; a larger eps keeps tiny ones from deciding.
ADAM = AdamParams(lr=5e-3, eps=1e-3, clip_norm=0.5)
CASES: dict[str, dict[str, Any]] = {
    "ppo": {"kl": {"coef": 0.2}, "off_policy": {"max": 1.5}},
    "gspo": {
        "loss": {"kind": "gspo", "clip_low": 0.02, "clip_high": 0.02, "aggregate": "sequences"},
        "off_policy": {"correct": "sequence_truncate", "max": 1.2},
    },
    "cispo": {
        "loss": {"kind": "cispo", "clip_low": 0.1, "clip_high": 0.1, "aggregate": "constant"},
        "kl": {"coef": 0.2, "where": "reward"},
        "off_policy": {"correct": "token_mask", "max": 1.3, "min": 0.8},
    },
    "dro": {"loss": {"kind": "dro", "beta": 0.5}, "off_policy": {"proximal": "behavior"}},
}


def step_settings(name: str) -> RlSettings:
    given = CASES[name]
    loss = {**given.get("loss", {}), "updates": 2, "minibatches": 2}
    return settings(**{**given, "loss": loss})


def logits_of(oracle: ReferenceEngine) -> Callable[[Tensor], Tensor]:
    return lambda ids_N: oracle.model(input_ids=ids_N[None], use_cache=False).logits[0]


def past_of(oracle: ReferenceEngine, temperature: float) -> list[Callable[[Tensor], Tensor]]:
    """Three policies that lie a little beside the adapter's."""

    def logprobs(ids_N: Tensor, version: int) -> Tensor:
        with torch.no_grad():
            logprobs_NV = torch.log_softmax(logits_of(oracle)(ids_N) / temperature, dim=-1)
        noise_N = torch.randn(len(ids_N) - 1, generator=torch.Generator().manual_seed(version))
        return logprobs_NV[:-1].gather(1, ids_N[1:, None])[:, 0] + 0.15 * noise_N

    return [lambda ids_N, version=version: logprobs(ids_N, version) for version in range(3)]


def on_engine(rl: RlSettings, engine: Engine, groups: Sequence[SampleGroup]) -> None:
    """Make the step's optimizer steps, the other adapter's in the same calls."""
    objective = Objective(rl)
    batch = objective.batch(groups)

    def logprobs(adapter: str | None) -> list[Array]:
        data, temperature = batch.forward_data(), objective.temperature
        work = ForwardBackward(
            adapter=adapter, data=data, backward=False, logprobs="trained", temperature=temperature
        )
        return list(must(engine.forward_backward([work]))[0].logprobs)

    minibatches = batch.minibatches(
        logprobs("own") if objective.needs_proximal else None,
        logprobs(None) if objective.needs_reference else None,
    )
    for minibatch in [*minibatches] * rl.loss.updates:
        work = ForwardBackward(
            adapter="own",
            data=minibatch.data,
            loss=objective.loss,
            config=objective.config,
            logprobs="trained",
            temperature=objective.temperature,
        )
        beside = replace(work, adapter="beside", temperature=0.7, logprobs="all")
        must(engine.forward_backward([beside, work]))
        must(
            engine.optim_step([OptimStep(adapter=name, params=ADAM) for name in ("own", "beside")])
        )


def by_reference(
    rl: RlSettings,
    oracle: ReferenceEngine,
    start: ReferenceEngine,
    base: ReferenceEngine,
    groups: Sequence[SampleGroup],
) -> None:
    for number in [*range(rl.loss.minibatches)] * rl.loss.updates:
        policies = [logits_of(one) for one in (oracle, start, base)]
        reference_step_loss(rl, groups, number, *policies).backward()
        oracle.optim_step(ADAM)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_after_a_step(tiny: Callable[[str], Path], name: str):
    rl, folder = step_settings(name), tiny("llama")
    engine = Engine(Opening(str(folder), token_budget=64))
    for adapter, rank in (("own", 5), ("beside", 2)):
        engine.create(adapter, AdapterSpec(rank=rank, seed=rank))
        perturb(engine, adapter)
    oracle, start, base = (ReferenceEngine(folder, engine.state("own")) for _ in range(3))
    for module in base.modules.values():
        module.lora_b.data.zero_()
    groups = ragged_groups(5, past_of(oracle, rl.sampling.temperature), VOCAB)
    before_P = oracle.weights()
    on_engine(rl, engine, groups)
    by_reference(rl, oracle, start, base, groups)
    found_P, expected_P = torch.as_tensor(np.array(engine.state("own").weights)), oracle.weights()
    moved = float((expected_P - before_P).norm())
    assert moved > 0.01
    assert float((found_P - expected_P).norm()) <= 1e-4 * moved


def test_a_forward_and_a_backward_see_the_same_policy(tiny: Callable[[str], Path]):
    """So that the ratio of a step's first minibatch is 1 to the bit, and no bound acts by noise."""
    engine = Engine(Opening(str(tiny("llama")), token_budget=64))
    engine.create("own", AdapterSpec(rank=5, seed=5))
    perturb(engine, "own")
    rl = step_settings("ppo")
    oracle = ReferenceEngine(tiny("llama"), engine.state("own"))
    objective = Objective(rl)
    batch = objective.batch(ragged_groups(5, past_of(oracle, objective.temperature), VOCAB))
    asked = batch.forward_data()

    def run(data: Sequence[Datum], **more: Any) -> Any:
        work = ForwardBackward(
            adapter="own",
            data=data,
            logprobs="trained",
            temperature=objective.temperature,
            **more,
        )
        return must(engine.forward_backward([work]))[0]

    p = list(run(asked, backward=False).logprobs)
    minibatch = batch.minibatches(p, p)[0]
    found = run(minibatch.data, loss=objective.loss, config=objective.config)
    for l_n, places, datum in zip(found.logprobs, found.positions, minibatch.data, strict=True):
        np.testing.assert_array_equal(l_n, datum.loss_inputs["logprobs"][places])
