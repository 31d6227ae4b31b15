"""A token that older weights have drawn counts f(w) times, w = exp(p - q).

q is its log-probability when it was drawn, p that of the weights at the start of the step. With w
a constant, the objective in the ratio to p is decoupled PPO with truncated importance sampling
(https://arxiv.org/abs/2110.00641, https://arxiv.org/abs/2505.24298).

T sampled tokens.
"""

import numpy as np

from manylora.config.rl import OffPolicySettings, Weighting
from manylora.types.data import Array


def masks(correct: Weighting) -> bool:
    """Return whether a correction rejects tokens, and does not only weigh them."""
    return correct in ("token_mask", "sequence_mask")


def corrected(
    proximal_T: Array, behavior_T: Array, sample_T: Array, settings: OffPolicySettings
) -> tuple[Array, Array]:
    """Return f(w) of each token, and which tokens are rejected.

    - token_truncate: min(w, max)
    - token_mask: w where min ≤ w ≤ max, else rejected
    - sequence_truncate, sequence_mask: the same with exp(Σ (p - q)) over all tokens of a sample
    - none: 1

    Args:
        proximal_T: p.
        behavior_T: q.
        sample_T: which sample a token belongs to, 0, 1, ….

    Returns:
        float64 [T], 0 where rejected; bool [T].
    """
    rejected_T = np.zeros(len(behavior_T), dtype=bool)
    if settings.correct == "none":
        return np.ones(len(behavior_T)), rejected_T
    log_ratio_T = proximal_T.astype(np.float64) - behavior_T.astype(np.float64)
    if settings.correct in ("sequence_truncate", "sequence_mask"):
        log_ratio_T = np.bincount(sample_T, weights=log_ratio_T)[sample_T]
    with np.errstate(over="ignore"):  # an infinite w is cut off or rejected like a large one
        w_T = np.exp(log_ratio_T)
    if masks(settings.correct):
        least = 0.0 if settings.min is None else settings.min
        rejected_T = ~((w_T >= least) & (w_T <= settings.max))
        return np.where(rejected_T, 0.0, w_T), rejected_T
    return np.minimum(w_T, settings.max), rejected_T
