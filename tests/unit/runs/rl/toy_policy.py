"""A small policy, the groups that it and its past selves drew, and the gradients of a step.

P parameters, N tokens, H hidden, V vocabulary, T positions of a datum.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.config import RlSettings
from manylora.losses import get_loss
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.runs.rl.step_batch import Minibatch, StepBatch
from manylora.runs.rl.step_reference import reference_step_loss
from manylora.types import Datum
from manylora.types.data import Array

V, H = 7, 5
P = V * H + H * H + H * V
MAX_TOKENS = 9


class ToyPolicy:
    """Its logits depend on all tokens so far, and on every parameter."""

    def __init__(self, weights_P: Tensor):
        self.weights_P = weights_P

    def __call__(self, ids_N: Tensor) -> Tensor:
        embedding, mixing, head = self.weights_P.split([V * H, H * H, H * V])
        seen_NH = embedding.view(V, H)[ids_N].cumsum(0) / torch.arange(1, len(ids_N) + 1)[:, None]
        return torch.tanh(seen_NH @ mixing.view(H, H)) @ head.view(H, V)

    def logprobs(self, ids_N: Tensor, temperature: float) -> Tensor:
        """Of each token after the first."""
        logprobs_NV = torch.log_softmax(self(ids_N) / temperature, dim=-1)
        return logprobs_NV[:-1].gather(1, ids_N[1:, None])[:, 0]

    def moved(self, seed: int, distance: float) -> "ToyPolicy":
        noise_P = torch.randn(P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return ToyPolicy(self.weights_P.detach() + distance * noise_P)


def toy_policy(seed: int) -> ToyPolicy:
    return ToyPolicy(torch.zeros(P, dtype=torch.float64)).moved(seed, 0.9)


def settings(**given: Any) -> RlSettings:
    """Settings of four groups, with what is given."""
    plain: dict[str, Any] = {"prompts": "rows.jsonl", "reward": "length", "groups": 4}
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 1.3}
    return RlSettings.model_validate({**plain, "sampling": sampling, **given})


def some_groups(seed: int, policy: ToyPolicy, temperature: float) -> list[SampleGroup]:
    """Ragged groups that the policy's past selves drew."""
    past = [policy.moved(seed + version, 0.25) for version in range(3)]
    return ragged_groups(seed, [partial(one.logprobs, temperature=temperature) for one in past], V)


def ragged_groups(
    seed: int, past: Sequence[Callable[[Tensor], Tensor]], vocabulary: int
) -> list[SampleGroup]:
    """Four ragged groups of several versions: the second without any difference, some samples cut,
    some in several turns or several segments.

    `past` gives the log-probabilities of each token after the first, by version.
    """
    draw = random.Random(seed)
    groups: list[SampleGroup] = []
    for number in range(4):
        rollouts: list[Rollout] = []
        for _ in range(draw.randint(2, 4)):
            count = draw.choice([1, 1, 2])
            parts = [_segment(draw, past, vocabulary, turns=3 - count) for _ in range(count)]
            reward = 0.1 + 0.2 if number == 1 else draw.choice([0.0, 0.25, 1.0, -0.5])
            stop = draw.choice(["stop", "stop", "length"])
            rollouts.append(Rollout(segments=tuple(parts), reward=reward, stop_reason=stop))
        groups.append(
            SampleGroup(step=3, number=number, row=number, version=0, rollouts=tuple(rollouts))
        )
    return groups


def _segment(
    draw: random.Random, past: Sequence[Callable[[Tensor], Tensor]], vocabulary: int, turns: int
) -> RolloutSegment:
    sampled: list[bool] = []
    for _ in range(draw.randint(1, turns)):
        sampled += [False] * draw.randint(1, 3) + [True] * draw.randint(1, 3)
    tokens_N = torch.tensor([draw.randrange(vocabulary) for _ in sampled])
    logprobs = np.zeros(len(sampled), np.float32)
    versions = np.full(len(sampled), -1, np.int32)
    drawn = [one(tokens_N) for one in past]
    for place, own in enumerate(sampled):
        if own:
            versions[place] = draw.randrange(len(past))
            logprobs[place] = drawn[versions[place]][place - 1]
    return RolloutSegment(tokens_N.numpy().astype(np.int32), np.array(sampled), logprobs, versions)


def forward(policy: ToyPolicy, data: Sequence[Datum], temperature: float) -> list[Array]:
    """What the engine's forward returns of the trained positions."""
    return [
        _of_targets(policy, datum, temperature)
        .numpy()
        .astype(np.float32)[datum.loss_inputs["weights"] != 0]
        for datum in data
    ]


def _of_targets(policy: ToyPolicy, datum: Datum, temperature: float) -> Tensor:
    targets_T = torch.from_numpy(datum.loss_inputs["target_tokens"])
    ids = torch.cat([torch.from_numpy(datum.tokens), targets_T[-1:]])
    return policy.logprobs(ids, temperature)


def minibatches_of(
    objective: Objective, batch: StepBatch, start: ToyPolicy, reference: ToyPolicy
) -> list[Minibatch]:
    """The data of a step's optimizer steps, after the passes that the objective asks for."""
    data, temperature = batch.forward_data(), objective.temperature
    return batch.minibatches(
        forward(start, data, temperature) if objective.needs_proximal else None,
        forward(reference, data, temperature) if objective.needs_reference else None,
    )


def gradient(objective: Objective, data: Sequence[Datum], policy: ToyPolicy) -> Tensor:
    """The gradient [P] by the engine's loss functions and the chain rule."""
    weights_P = policy.weights_P.detach().clone().requires_grad_()
    total_P = torch.zeros(P, dtype=torch.float64)
    for datum in data:
        logprobs_T = _of_targets(ToyPolicy(weights_P), datum, objective.temperature)
        slope_T = engine_loss(objective, logprobs_T.detach(), datum)[1]
        (grad_P,) = torch.autograd.grad(logprobs_T, weights_P, slope_T)
        total_P += grad_P
    return total_P


def engine_loss(objective: Objective, logprobs_T: Tensor, datum: Datum) -> tuple[Tensor, Tensor]:
    """Each position's loss [T] and its derivative [T], as the engine has them."""
    loss = get_loss(objective.loss)
    loss.check(datum)
    inputs = {name: torch.from_numpy(each).double() for name, each in datum.loss_inputs.items()}
    for name, make in loss.sequence_inputs.items():
        inputs[name] = make(logprobs_T, inputs, [len(logprobs_T)])
    loss_T, slope_T = loss.function(logprobs_T, inputs, loss.settings(objective.config))
    # Elsewhere the engine need not look.
    trained_T = torch.from_numpy(loss.trained(datum))
    assert not slope_T[~trained_T].any()
    return loss_T, slope_T


def expected_gradient(
    rl: RlSettings,
    groups: Sequence[SampleGroup],
    minibatch: int,
    policy: ToyPolicy,
    start: ToyPolicy,
    reference: ToyPolicy,
) -> Tensor:
    """The gradient [P] of the oracle's loss."""
    weights_P = policy.weights_P.detach().clone().requires_grad_()
    loss = reference_step_loss(rl, groups, minibatch, ToyPolicy(weights_P), start, reference)
    if not loss.requires_grad:
        return torch.zeros(P, dtype=torch.float64)
    return torch.autograd.grad(loss, weights_P)[0]


def relative_error(found_P: Tensor, expected_P: Tensor) -> float:
    """Of the whole vector; 0 if both are 0."""
    error, size = float((found_P - expected_P).norm()), float(expected_P.norm())
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))
