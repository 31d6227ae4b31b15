"""CISPO is -sg[clip(r, low, high)]·A·l (https://arxiv.org/abs/2506.13585); sg stops gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor


def cispo(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return per-token loss [T] and its derivative by l [T]; every token keeps a gradient."""
    ratio_T = torch.exp(logprobs_T - inputs["logprobs"])
    clipped_T = ratio_T.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    slope_T = -clipped_T * inputs["advantages"]
    return slope_T * logprobs_T, slope_T
