"""The oracle of a step: one adapter, one token after another, as the formulas stand, for autograd.

Nothing here is shared with what it is compared with but the settings and the records. Numbers that
are constants of a step are Python's; only what is differentiated is a tensor.

l is a token's log-probability while it is trained, p at the start of the step, q when it was drawn,
ref that of the reference. N tokens of a segment, V vocabulary.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.config import RlSettings
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup

# Token ids [N] to logits [N, V].
Policy = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class ReferenceToken:
    """A `ReferenceToken` is a sampled token with what the formulas know of it."""

    group: int
    sample: tuple[int, int]
    segment: tuple[int, int, int]
    l: Tensor  # noqa: E741
    p: float
    q: float
    ref: float
    advantage: float = 0.0
    weight: float = 1.0
    rejected: bool = False


def reference_step_loss(
    rl: RlSettings,
    groups: Sequence[SampleGroup],
    minibatch: int,
    policy: Policy,
    start: Policy,
    reference: Policy,
) -> Tensor:
    """Return the loss of one optimizer step.

    Args:
        minibatch: which one of the step's, 0, 1, ….
        policy: as it is now; the loss is differentiable by what it depends on.
        start: the policy as it was at the start of the step.
        reference: what the policy is pulled to.
    """
    tokens = _tokens(rl, groups, policy, start, reference)
    _set_advantages(rl, groups, tokens)
    _set_corrections(rl, tokens)
    _take_divergence_off(rl, tokens)
    own = _groups_of_minibatch(len(groups), rl.loss.minibatches, minibatch)
    kept = [token for token in tokens if token.group in own and not token.rejected]
    loss = torch.zeros((), dtype=torch.float64)
    for token in kept:
        term = _policy_loss(rl, token, kept)
        if rl.kl.coef > 0 and rl.kl.where == "loss":
            term = term + rl.kl.coef * _divergence(rl.kl.estimator, token.l, token.ref)
        loss = loss + term / _denominator(rl, token, kept)
    return loss


def _tokens(
    rl: RlSettings, groups: Sequence[SampleGroup], policy: Policy, start: Policy, reference: Policy
) -> list[ReferenceToken]:
    tokens: list[ReferenceToken] = []
    for g, group in enumerate(groups):
        for r, rollout in enumerate(group.rollouts):
            if rl.overlong.mask_truncated and rollout.stop_reason == "length":
                continue
            for s, segment in enumerate(rollout.segments):
                l = _logprobs(policy, segment, rl.sampling.temperature)  # noqa: E741
                with torch.no_grad():
                    p = _logprobs(start, segment, rl.sampling.temperature)
                    ref = _logprobs(reference, segment, rl.sampling.temperature)
                for n in range(len(segment.tokens)):
                    if segment.sampled[n]:
                        q = float(segment.logprobs[n])
                        behavior = rl.off_policy.proximal == "behavior"
                        proximal = q if behavior else float(p[n - 1])
                        known = l[n - 1], proximal, q, float(ref[n - 1])
                        tokens.append(ReferenceToken(g, (g, r), (g, r, s), *known))
    return tokens


def _logprobs(policy: Policy, segment: RolloutSegment, temperature: float) -> list[Tensor]:
    """Return the log-probability of each token after the first."""
    ids = torch.tensor(segment.tokens.tolist())
    logprobs_NV = torch.log_softmax(policy(ids) / temperature, dim=-1)
    return [logprobs_NV[n, ids[n + 1]] for n in range(len(ids) - 1)]


def _reward(rl: RlSettings, rollout: Rollout) -> float:
    """Return the reward less the penalty for length."""
    longest, buffer = rl.sampling.max_tokens, rl.overlong.buffer
    length = sum(int(sampled) for segment in rollout.segments for sampled in segment.sampled)
    if rollout.stop_reason == "length":
        return rollout.reward - rl.overlong.penalty
    if length <= longest - buffer or buffer == 0:
        return rollout.reward
    if length <= longest:
        return rollout.reward + rl.overlong.penalty * (longest - buffer - length) / buffer
    return rollout.reward - rl.overlong.penalty


def _set_advantages(
    rl: RlSettings, groups: Sequence[SampleGroup], tokens: Sequence[ReferenceToken]
) -> None:
    rewards = [[_reward(rl, rollout) for rollout in group.rollouts] for group in groups]
    everyone = [reward for group in rewards for reward in group]
    for token in tokens:
        g, r = token.sample
        own = rewards[g]
        if len(set(own)) == 1:
            token.advantage = 0.0
            continue
        if rl.advantage.kind == "rloo":
            others = own[:r] + own[r + 1 :]
            token.advantage = own[r] - sum(others) / len(others)
        else:
            token.advantage = own[r] - sum(own) / len(own)
        if rl.advantage.scale == "group":
            token.advantage /= statistics.stdev(own) + 1e-6
        if rl.advantage.scale == "batch":
            token.advantage /= statistics.stdev(everyone) + 1e-6


def _set_corrections(rl: RlSettings, tokens: Sequence[ReferenceToken]) -> None:
    correct = rl.off_policy.correct
    for token in tokens:
        if correct == "none":
            continue
        if correct.startswith("token"):
            w = math.exp(token.p - token.q)
        else:
            w = math.exp(sum(one.p - one.q for one in tokens if one.sample == token.sample))
        if correct.endswith("truncate"):
            token.weight = min(w, rl.off_policy.max)
        else:
            too_small = rl.off_policy.min is not None and w < rl.off_policy.min
            token.rejected = too_small or w > rl.off_policy.max
            token.weight = 0.0 if token.rejected else w


def _take_divergence_off(rl: RlSettings, tokens: Sequence[ReferenceToken]) -> None:
    """Subtract coef · (p - ref) from the advantages, centred over what the step keeps."""
    if rl.kl.coef == 0 or rl.kl.where != "reward":
        return
    distances = [token.p - token.ref for token in tokens if not token.rejected]
    for token in tokens:
        if not token.rejected:
            distance = token.p - token.ref - sum(distances) / len(distances)
            token.advantage -= rl.kl.coef * distance


def _groups_of_minibatch(groups: int, minibatches: int, number: int) -> list[int]:
    """Deal the groups out in their order; the first minibatches have one more if need be."""
    sizes = [groups // minibatches + (one < groups % minibatches) for one in range(minibatches)]
    first = sum(sizes[:number])
    return list(range(first, first + sizes[number]))


def _denominator(rl: RlSettings, token: ReferenceToken, kept: Sequence[ReferenceToken]) -> float:
    samples = len({one.sample for one in kept})
    if rl.loss.aggregate == "tokens":
        return len(kept)
    if rl.loss.aggregate == "sequences":
        return samples * len([one for one in kept if one.sample == token.sample])
    return samples * rl.sampling.max_tokens


def _policy_loss(rl: RlSettings, token: ReferenceToken, kept: Sequence[ReferenceToken]) -> Tensor:
    loss, advantage = rl.loss, token.advantage * token.weight
    if loss.kind == "dro":
        assert loss.beta is not None
        return -token.l * advantage + loss.beta * (token.l - token.p) ** 2 / 2
    ratio = torch.exp(token.l - token.p)
    if loss.kind == "importance_sampling":
        return -ratio * advantage
    assert loss.clip_low is not None
    assert loss.clip_high is not None
    low, high = 1 - loss.clip_low, 1 + loss.clip_high
    if loss.kind == "cispo":
        return -ratio.clamp(low, high).detach() * advantage * token.l
    if loss.kind == "gspo":
        whole = [one for one in kept if one.segment == token.segment]
        mean = sum(float(one.l.detach()) - one.p for one in whole) / len(whole)
        ratio = math.exp(mean) * torch.exp(token.l - token.l.detach())
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def _divergence(estimator: str, l: Tensor, ref: float) -> Tensor:  # noqa: E741
    if estimator == "k1":
        return l - ref
    if estimator == "k2":
        return (l - ref) ** 2 / 2
    return torch.exp(ref - l) - (ref - l) - 1
