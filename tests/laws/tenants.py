"""Tenants with fixed plans of work, and what came out of it for each.

P parameters of an adapter, N tokens of a datum, K targets of each position.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.engine import Engine
from manylora.lora.state import AdapterState
from manylora.types import (
    AdamParams,
    AdapterSpec,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    Wanted,
)
from tests.models import VOCAB
from tests.threads import check_expected

# What a tenant may learn by, with the loss's settings. `distillation` is cross-entropy with several
# targets for each position.
LOSSES: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.7},
    "cispo": {"clip_high_threshold": 1.5},
    "dro": {"beta": 0.1},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.4},
    "distillation": {},
}


def random_data(
    rng: np.random.Generator,
    count: int,
    loss: str = "cross_entropy",
    lengths: tuple[int, int] = (2, 20),
    vocab: int = VOCAB,
) -> list[Datum]:
    """Data for `loss`; weights and advantages have either sign."""
    data = []
    for _ in range(count):
        length = int(rng.integers(*lengths))
        tokens = rng.integers(0, vocab, length + 1)
        inputs: dict[str, Any] = {"target_tokens": tokens[1:]}
        if loss == "cross_entropy":
            inputs["weights"] = rng.normal(size=length)
        elif loss == "distillation":
            inputs |= _several_targets(rng, tokens[1:], vocab)
        else:
            inputs["logprobs"] = rng.normal(-5.0, 0.3, size=length)
            inputs["advantages"] = rng.normal(size=length)
        if loss == "gspo":
            mask = rng.integers(0, 2, size=length)
            mask[rng.integers(length)] = 1
            inputs["sequence_ratio_mask"] = mask
        data.append(Datum(tokens[:-1], inputs))
    return data


def _several_targets(rng: np.random.Generator, targets: Any, vocab: int) -> dict[str, Any]:
    """1 to 5 targets for each position, some named twice, some without weight; or one, plainly."""
    count = int(rng.integers(0, 6))
    if count == 0:
        return {"target_tokens": targets, "weights": rng.normal(size=len(targets))}
    targets_NK = rng.integers(0, vocab, (len(targets), count))
    targets_NK[:, 0] = targets
    targets_NK[:, 2:4] = targets_NK[:, :1]
    weights_NK = rng.normal(size=targets_NK.shape) * rng.integers(0, 4, targets_NK.shape) / 4
    return {"target_tokens": targets_NK, "weights": weights_NK}


def thinned(rng: np.random.Generator, data: Sequence[Datum], share: float) -> list[Datum]:
    """The data with about `share` of their positions left untrained, one at least of each trained
    (by `dro` every position is)."""
    thin = []
    for datum in data:
        keep = rng.random(len(datum)) >= share
        keep[rng.integers(len(datum))] = True
        inputs = dict(datum.loss_inputs)
        for name in {"weights", "advantages", "sequence_ratio_mask"} & set(inputs):
            kept = keep if inputs[name].ndim == 1 else keep[:, None]
            inputs[name] = np.where(kept, inputs[name], 0)
        if "sequence_ratio_mask" in inputs:
            # Some have a part in the ratio and no advantage.
            without = rng.random(len(datum)) < 0.5
            without[first := np.argmax(keep)] = False
            inputs["advantages"][without] = 0.0
            inputs["sequence_ratio_mask"][first] = 1
        thin.append(replace(datum, loss_inputs=inputs))
    return thin


def work_of(adapter: str, loss: str, data: Sequence[Datum]) -> ForwardBackward:
    """The operation of one of `LOSSES`."""
    name = "cross_entropy" if loss == "distillation" else loss
    return ForwardBackward(adapter=adapter, data=data, loss=name, config=LOSSES[loss])


def must(outcomes: Iterable[Any]) -> list[Any]:
    """The results; an error among them is raised. They were computed under the test's number of
    threads."""
    check_expected()
    results = list(outcomes)
    for outcome in results:
        if isinstance(outcome, Exception):
            raise outcome
    return results


def perturb(engine: Engine, name: str) -> None:
    """Move an adapter away from B = 0, by numbers that depend on its name alone."""
    adapter = engine.adapters[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    adapter.master_P.add_(0.05 * torch.randn(adapter.master_P.shape, generator=generator))
    adapter.publish()


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """One adapter and its plan: a round is `calls` forward-backwards, and every `every`-th round
    ends in an optimizer step. It is there from round `join` to before round `leave`. About
    `untrained` of its positions are not trained, and its calls want, in turn, `wanted`."""

    name: str
    spec: AdapterSpec
    losses: Sequence[str] = ("cross_entropy",)
    num_data: int = 3
    lengths: tuple[int, int] = (2, 20)
    calls: int = 1
    every: int = 1
    join: int = 0
    leave: int | None = None
    untrained: float = 0.0
    wanted: Sequence[Wanted] = ("all",)
    params: AdamParams = field(
        default_factory=lambda: AdamParams(lr=1e-3, clip_norm=1.0, weight_decay=0.01)
    )

    def present(self, number: int) -> bool:
        return self.join <= number and (self.leave is None or number < self.leave)

    def steps(self, number: int) -> bool:
        return self.present(number) and (number - self.join + 1) % self.every == 0

    def works(self, number: int, vocab: int = VOCAB) -> list[ForwardBackward]:
        """This round's calls; the same whoever else is there."""
        if not self.present(number):
            return []
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), number])
        works = []
        for call in range(self.calls):
            loss = self.losses[(number + call) % len(self.losses)]
            data = random_data(rng, self.num_data, loss, self.lengths, vocab)
            if self.untrained:
                data = thinned(rng, data, self.untrained)
            wanted = self.wanted[(number + call) % len(self.wanted)]
            works.append(replace(work_of(self.name, loss, data), logprobs=wanted))
        return works


@dataclass
class Trace:
    """What one tenant got: its first state, every output, every gradient, its last state."""

    start: AdapterState
    results: list[ForwardBackwardResult] = field(default_factory=list)
    gradients_P: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    end: AdapterState | None = None


def train(
    engine: Engine, tenants: Sequence[Tenant], rounds: int, vocab: int = VOCAB
) -> dict[str, Trace]:
    """Let all tenants train together; their adapters are gone afterwards."""
    traces: dict[str, Trace] = {}
    for number in range(rounds):
        for tenant in tenants:
            if tenant.join == number:
                engine.create(tenant.name, tenant.spec)
                perturb(engine, tenant.name)
                traces[tenant.name] = Trace(engine.state(tenant.name))
        _round(engine, tenants, number, traces, vocab)
        for tenant in tenants:
            if number + 1 == min(tenant.leave or rounds, rounds):
                traces[tenant.name].end = engine.state(tenant.name)
                engine.unload(tenant.name)
    return traces


def _round(
    engine: Engine,
    tenants: Sequence[Tenant],
    number: int,
    traces: dict[str, Trace],
    vocab: int,
) -> None:
    works = [work for tenant in tenants for work in tenant.works(number, vocab)]
    for work, result in zip(works, must(engine.forward_backward(works)), strict=True):
        traces[str(work.adapter)].results.append(result)
    due = [tenant for tenant in tenants if tenant.steps(number)]
    for tenant in due:
        grad_P = engine.adapters[tenant.name].grad_P
        assert grad_P is not None
        traces[tenant.name].gradients_P.append(grad_P.clone())
    steps = [OptimStep(adapter=tenant.name, params=tenant.params) for tenant in due]
    for tenant, result in zip(due, must(engine.optim_step(steps)), strict=True):
        traces[tenant.name].norms.append(result.grad_norm)


def assert_same_bits(one: Trace, other: Trace, name: str = "") -> None:
    """Every output, gradient and number of state is the same to the last bit."""
    assert len(one.results) == len(other.results) > 0
    for number, (a, b) in enumerate(zip(one.results, other.results, strict=True)):
        for x, y in zip(a.positions or (), b.positions or (), strict=True):
            assert np.array_equal(x, y), f"{name}: positions of call {number}"
        for datum, (x, y) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            assert np.array_equal(x, y), f"{name}: log-probabilities, call {number}, datum {datum}"
    assert_same_training(one, other, name)


def assert_same_training(one: Trace, other: Trace, name: str = "") -> None:
    """The same bits in every loss, gradient and number of state, whatever else came back."""
    for number, (a, b) in enumerate(zip(one.results, other.results, strict=True)):
        assert a.loss == b.loss, f"{name}: loss of call {number}"
    assert len(one.gradients_P) == len(other.gradients_P) > 0
    for number, (g, h) in enumerate(zip(one.gradients_P, other.gradients_P, strict=True)):
        assert torch.equal(g, h), f"{name}: gradient of step {number + 1}"
        assert g.any(), f"{name}: the gradient of step {number + 1} is all zeros"
    assert one.norms == other.norms, name
    assert one.end is not None and other.end is not None
    assert_same_state(one.end, other.end, name)


def assert_same_state(one: AdapterState, other: AdapterState, name: str = "") -> None:
    """Weights, moments, pending gradient and counters are the same to the last bit."""
    check_expected()
    for field_name in ("weights", "exp_avg", "exp_avg_sq", "grad"):
        a, b = getattr(one, field_name), getattr(other, field_name)
        assert (a is None) == (b is None), f"{name}: {field_name}"
        assert a is None or np.array_equal(a, b), f"{name}: {field_name}"
    assert (one.step, one.draws, one.poison) == (other.step, other.draws, other.poison), name
