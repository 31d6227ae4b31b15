"""DRO is -(l·A - ½·beta·(l - q)²), an off-policy loss with a quadratic pull to the sampler."""

from collections.abc import Mapping

from torch import Tensor


def dro(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], settings: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return per-token loss [T] and its derivative by l [T]."""
    advantages_T, beta = inputs["advantages"], settings["beta"]
    distance_T = logprobs_T - inputs["logprobs"]
    loss_T = 0.5 * beta * distance_T * distance_T - logprobs_T * advantages_T
    return loss_T, beta * distance_T - advantages_T
