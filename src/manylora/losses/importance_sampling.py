"""The importance-sampled policy gradient is -r·A, with r = exp(l - q)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def importance_sampling(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], _settings: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return per-token loss [T] and its derivative by l [T]; r's derivative is r itself."""
    loss_T = -torch.exp(logprobs_T - inputs["logprobs"]) * inputs["advantages"]
    return loss_T, loss_T
