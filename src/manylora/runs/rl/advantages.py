"""An advantage says how much better than its group a sample was; a factor of it makes the mean.

The engine's losses are plain sums over tokens. Whatever is a mean in a formula stands here as a
factor of each token's advantage, so that cutting a step into micro-batches changes no number.

G samples of a group, S samples of an optimizer step, T sampled tokens of it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from manylora.config.rl import AdvantageSettings, OverlongSettings
from manylora.types.data import Array

# Added to a standard deviation before something is divided by it.
EPSILON = 1e-6


def all_equal(rewards_G: Array) -> bool:
    """Return whether a group teaches nothing, because no sample of it is better than another."""
    return bool(np.min(rewards_G) == np.max(rewards_G))


def advantages(groups: Sequence[Array], settings: AdvantageSettings) -> list[Array]:
    """Return the advantage of each sample.

    - grpo: R - mean (https://arxiv.org/abs/2402.03300), usually divided by the group's deviation
    - dr_grpo: R - mean (https://arxiv.org/abs/2503.20783)
    - rloo: R - mean of the others (https://arxiv.org/abs/2402.14740)

    Divided by the standard deviation (of n - 1) plus 1e-6 of the group's rewards, of those of all
    groups, or not.

    Args:
        groups: rewards [G] of each group of the step, G ≥ 2; groups may differ in size.

    Returns:
        float64 [G] of each group; exactly 0 where a group's rewards are all equal. (The mean of
        equal numbers is not always that number, and what is left must not be divided by 1e-6.)
    """
    exact = [np.asarray(rewards_G, dtype=np.float64) for rewards_G in groups]
    batch = _deviation(np.concatenate(exact)) if settings.scale == "batch" and exact else 1.0
    found: list[Array] = []
    for rewards_G in exact:
        if all_equal(rewards_G):
            found.append(np.zeros_like(rewards_G))
            continue
        scale = _deviation(rewards_G) if settings.scale == "group" else batch
        found.append((rewards_G - _baseline(rewards_G, settings.kind)) / scale)
    return found


def _baseline(rewards_G: Array, kind: Literal["grpo", "rloo", "dr_grpo"]) -> Array:
    if kind == "rloo":
        return (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return np.full_like(rewards_G, rewards_G.mean())


def _deviation(rewards: Array) -> float:
    return float(np.std(rewards, ddof=1)) + EPSILON


def overlong_penalties(
    lengths_G: Array, truncated_G: Array, max_tokens: int, settings: OverlongSettings
) -> Array:
    """Return what is added to the rewards for length, ≤ 0: DAPO's soft overlong punishment.

    With L = max_tokens and C = buffer it is 0 up to L - C tokens, falls to -penalty at L, and is
    -penalty where an answer was cut (https://arxiv.org/abs/2503.14476, section 3.4).

    Args:
        lengths_G: sampled tokens of each sample.
        truncated_G: whether it was cut.

    Returns:
        float64 [G].
    """
    over_G = np.asarray(lengths_G, dtype=np.float64) - (max_tokens - settings.buffer)
    share_G = np.clip(over_G / max(settings.buffer, 1), 0.0, 1.0)
    if settings.buffer == 0:
        share_G = np.zeros_like(over_G)
    return -settings.penalty * np.where(np.asarray(truncated_G, dtype=bool), 1.0, share_G)


def token_factors(
    sample_T: Array,
    kept_T: Array,
    aggregate: Literal["tokens", "sequences", "constant"],
    max_tokens: int,
) -> Array:
    """Return the factor of each token that makes an optimizer step's sum the mean it should be.

    - tokens: 1 / tokens of the optimizer step (https://arxiv.org/abs/2503.14476)
    - sequences: 1 / (samples · tokens of the sample) (https://arxiv.org/abs/2402.03300)
    - constant: 1 / (samples · max_tokens) (https://arxiv.org/abs/2503.20783)

    Only tokens that are kept count, and only samples with such a token; the advantage of a token
    that counts may well be 0.

    Args:
        sample_T: which sample of the optimizer step a token belongs to, 0, 1, ….
        kept_T: bool; the others were rejected.

    Returns:
        float64 [T]; 0 for tokens that are not kept.
    """
    kept_S = np.bincount(sample_T[kept_T], minlength=1)
    count = np.count_nonzero(kept_S)
    if count == 0:
        return np.zeros(len(kept_T))
    if aggregate == "tokens":
        return kept_T / float(np.count_nonzero(kept_T))
    if aggregate == "constant":
        return kept_T / float(count * max_tokens)
    each_T = np.zeros(len(kept_T))
    each_T[kept_T] = 1.0 / (count * kept_S[sample_T[kept_T]].astype(np.float64))
    return each_T
