"""GSPO, here with advantages per token, is PPO's objective with one ratio for the whole sequence
(https://arxiv.org/abs/2507.18071).

    s   = exp(mean over the mask of (sg[l] - q))
    s_t = s · exp(l_t - sg[l_t])                      equal to s; l_t's derivative of it is s, too
    -min(s_t·A_t, clip(s_t, low, high)·A_t)

sg stops the gradient. s is known only when the log-probabilities of the whole sequence are, so the
engine makes `sequence_log_ratio` beforehand.

T tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manylora.losses.ppo import clipped_objective


def gspo(
    _logprobs_T: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return the loss [T] and its derivative by l [T], zero where the clipped term is smaller."""
    ratio_T = torch.exp(inputs["sequence_log_ratio"])
    return clipped_objective(ratio_T, inputs["advantages"], settings)


def sequence_log_ratio(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]
) -> Tensor:
    """Return log s [T] of each token's sequence; 0 where its mask is all 0, and after the last.

    Each sequence is summed by itself, so its bits do not depend on the others.
    """
    mask_T = inputs["sequence_ratio_mask"].double()
    distance_T = mask_T * (logprobs_T.double() - inputs["logprobs"].double())
    log_ratio_T = torch.zeros_like(logprobs_T)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        log_ratio_T[rows] = distance_T[rows].sum() / mask_T[rows].sum().clamp(min=1.0)
        start += length
    return log_ratio_T
