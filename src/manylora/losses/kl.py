"""The KL divergence to a reference policy is estimated at each sampled token.

With l = log p(token) of the policy and ref of the reference, and d = ref - l, the estimators of
http://joschu.net/blog/kl-approx.html are

    k1 = -d                      unbiased, of either sign
    k2 = ½·d²                    its gradient's mean is that of the KL
    k3 = exp(d) - d - 1          unbiased and never negative (GRPO, https://arxiv.org/abs/2402.03300)

T tokens.
"""

import torch
from torch import Tensor

ESTIMATORS = (1.0, 2.0, 3.0)


def kl_to_reference(
    logprobs_T: Tensor, reference_T: Tensor, estimator: float
) -> tuple[Tensor, Tensor]:
    """Return k [T] of an estimator, 1 to 3, and its derivative by l [T]."""
    distance_T = reference_T - logprobs_T
    if estimator == 1.0:
        return -distance_T, torch.ones_like(distance_T)
    if estimator == 2.0:
        return 0.5 * distance_T * distance_T, -distance_T
    # Close to the reference, exp(d) - 1 would be lost in rounding.
    grown_T = torch.expm1(distance_T)
    return grown_T - distance_T, -grown_T
