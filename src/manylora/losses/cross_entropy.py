"""Weighted cross-entropy is -w·l, with weights of either sign.

Where a position has K targets (distillation from a teacher's likeliest tokens), its loss is the sum
over them.
"""

from collections.abc import Mapping

from torch import Tensor


def cross_entropy(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], _settings: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return per-token loss -w·l [T] and its derivative by l, -w [T]."""
    slope_T = -inputs["weights"]
    return slope_T * logprobs_T, slope_T
