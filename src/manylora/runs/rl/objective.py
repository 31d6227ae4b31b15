"""The settings of a run say what is minimised; here that becomes one of the engine's losses.

    u = exp(l - p), w = exp(p - q), loss = Σ ℓ(u, A·f(w)·factor) + coef·factor·k(l, ref)

l is a token's log-probability while it is trained, p at the start of the step (proximal), q when it
was drawn (behavior), A its advantage. f(w) is a constant of each token, so decoupled PPO needs no
loss of its own: p goes into `logprobs`, everything else into `advantages`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manylora.config import RlSettings
from manylora.runs.rl.advantages import EPSILON, all_equal, overlong_penalties
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.step_batch import StepBatch
from manylora.types.data import Array

ESTIMATORS = {"k1": 1.0, "k2": 2.0, "k3": 3.0}
# Where u is 1 everywhere, the gradient of these is -A·f(w)·∇l: their bounds hold 1 between them.
_ALIKE = ("ppo", "cispo", "importance_sampling")


@dataclass(frozen=True, slots=True)
class Objective:
    """An `Objective` is what a run minimises, in the words of the engine."""

    rl: RlSettings

    @property
    def folded(self) -> bool:
        """The step finds p while it trains, so no pass before it is needed.

        With one optimizer step l and p are the same, u is 1, and no clipping can act. What remains
        is the gradient f(w)·A·∇l with w = exp(l - q): `cispo` in the ratio to q, which it holds
        between 0 and max, or at 1 where nothing is corrected. A correction that rejects tokens
        must know p before the step, and so must a KL term in the reward.
        """
        rl = self.rl
        return (
            rl.off_policy.proximal == "recompute"
            and rl.loss.updates == rl.loss.minibatches == 1
            and rl.loss.kind in _ALIKE
            and rl.off_policy.correct in ("token_truncate", "none")
            and not (self.needs_reference and rl.kl.where == "reward")
        )

    @property
    def loss(self) -> str:
        """This is the engine's name of the loss."""
        # dro pulls each token of a sequence, prompts too; the same with a pull of sampled ones.
        return "cispo" if self.folded or self.rl.loss.kind == "dro" else self.rl.loss.kind

    @property
    def config(self) -> dict[str, float]:
        """These are the engine's settings of the loss."""
        off_policy = self.rl.off_policy
        if self.folded and off_policy.correct == "token_truncate":
            config = {"clip_low_threshold": 0.0, "clip_high_threshold": float(off_policy.max)}
        elif self.folded or self.rl.loss.kind == "dro":
            config = {"clip_low_threshold": 1.0, "clip_high_threshold": 1.0}
        else:
            config = dict(self.rl.loss.thresholds)
        if self.rl.loss.kind == "dro":
            return {**config, "kl_estimator": ESTIMATORS["k2"]}
        if self.needs_reference and self.rl.kl.where == "loss":
            return {**config, "kl_estimator": ESTIMATORS[self.rl.kl.estimator]}
        return config

    @property
    def temperature(self) -> float:
        """The policy is the base's distribution at this temperature; l, p and ref are of it."""
        return float(self.rl.sampling.temperature)

    @property
    def needs_proximal(self) -> bool:
        """A step begins with a `forward` of the weights as they are."""
        return self.rl.off_policy.proximal == "recompute" and not self.folded

    @property
    def needs_reference(self) -> bool:
        """A step begins with a `forward` of the reference."""
        return self.rl.kl.coef > 0

    def rewards(self, group: SampleGroup) -> Array:
        """Return the reward of each sample, float64 [G], its penalty for length included."""
        rollouts = group.rollouts
        lengths_G = np.array([rollout.num_sampled for rollout in rollouts])
        truncated_G = np.array([rollout.truncated for rollout in rollouts])
        earned_G = np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
        return earned_G + overlong_penalties(
            lengths_G, truncated_G, self.rl.sampling.max_tokens, self.rl.overlong
        )

    def teaches(self, group: SampleGroup) -> bool:
        """Return whether some sample of the group is better than another."""
        return not all_equal(self.rewards(group))

    def batch(self, groups: Sequence[SampleGroup]) -> StepBatch:
        """Return what a step trains of its groups, each of two samples or more."""
        return StepBatch(self.rl, self.folded, groups, [self.rewards(group) for group in groups])

    def formula(self) -> str:
        """Return the objective in one line, with its numbers, as it will be computed."""
        rl = self.rl
        mean = {
            "tokens": "mean over tokens",
            "sequences": "mean over samples of the mean over their tokens",
            "constant": f"sum / (samples · {rl.sampling.max_tokens})",
        }[rl.loss.aggregate]
        terms = f"loss = {mean} of {self._policy_term()}"
        if self.needs_reference and rl.kl.where == "loss":
            terms += f" + {rl.kl.coef:g}·{self._divergence()}"
        names = {"behavior": ", p = q", "recompute": ""}[rl.off_policy.proximal]
        return f"{terms}; A = {self._advantage()}{names}; T = {self.temperature:g}"

    def _policy_term(self) -> str:
        kind, bounds = self.rl.loss.kind, tuple(self.rl.loss.thresholds.values())
        if self.folded:
            ratio = f"min(exp(l - q), {self.rl.off_policy.max:g})·"
            return f"-{ratio if self.rl.off_policy.correct == 'token_truncate' else ''}A·l"
        if kind == "importance_sampling":
            return "-exp(l - p)·A"
        if kind == "dro":
            return f"-A·l + ½·{bounds[0]:g}·(l - p)²"
        ratio = "exp(mean of l - p over the sequence)" if kind == "gspo" else "exp(l - p)"
        clipped = f"clip({ratio}, {bounds[0]:g}, {bounds[1]:g})"
        return f"-{clipped}·A·l" if kind == "cispo" else f"-min({ratio}·A, {clipped}·A)"

    def _divergence(self) -> str:
        against = self.rl.kl.reference
        return {
            "k1": f"(l - {against})",
            "k2": f"½(l - {against})²",
            "k3": f"(exp({against} - l) - ({against} - l) - 1)",
        }[self.rl.kl.estimator]

    def _advantage(self) -> str:
        rl = self.rl
        centre = "mean of the others" if rl.advantage.kind == "rloo" else "mean"
        text = f"(R - {centre})"
        if rl.advantage.scale in ("group", "batch"):
            text += f" / (std of the {rl.advantage.scale} + {EPSILON:g})"
        if self.needs_reference and rl.kl.where == "reward":
            text = f"({text} - {rl.kl.coef:g}·(p - {rl.kl.reference}, centred))"
        return text if self.folded else self._correction() + text

    def _correction(self) -> str:
        off_policy = self.rl.off_policy
        if off_policy.correct == "none":
            return ""
        whole = off_policy.correct in ("sequence_truncate", "sequence_mask")
        ratio = "exp(Σ p - q)" if whole else "exp(p - q)"
        if off_policy.correct in ("token_truncate", "sequence_truncate"):
            return f"min({ratio}, {off_policy.max:g})·"
        return f"({ratio} if within {off_policy.min or 0:g} … {off_policy.max:g}, else left out)·"
