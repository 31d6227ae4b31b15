"""PPO's clipped objective is -min(r·A, clip(r, low, high)·A) (https://arxiv.org/abs/1707.06347).

The thresholds bound the ratio itself (0.8 and 1.2), not its distance from 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def ppo(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return the loss [T] and its derivative by l [T], zero where the clipped term is smaller."""
    ratio_T = torch.exp(logprobs_T - inputs["logprobs"])
    return clipped_objective(ratio_T, inputs["advantages"], settings)


def clipped_objective(
    ratio_T: Tensor, advantages_T: Tensor, settings: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return the objective of a ratio [T] whose derivative by l is the ratio itself."""
    clipped_T = ratio_T.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    free_T, held_T = ratio_T * advantages_T, clipped_T * advantages_T
    loss_T = -torch.minimum(free_T, held_T)
    slope_T = torch.where(free_T <= held_T, -free_T, torch.zeros_like(free_T))
    return loss_T, slope_T
