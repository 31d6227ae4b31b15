"""AdamW and clipping act on flat fp32 vectors, one adapter each.

P parameters of an adapter.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from manylora.types import AdamParams


def gradient_norms(grads_P: Sequence[Tensor]) -> Iterator[float]:
    """Return the L2 norm of each adapter's gradient, fetched from a device together.

    In host memory each is made when it is asked for, so that the step finds the gradient in cache.
    """
    norms = (torch.linalg.vector_norm(grad) for grad in grads_P)
    if grads_P[0].is_cpu:
        return (norm.item() for norm in norms)
    return iter(torch.stack(list(norms)).tolist())


def clip_(grad_P: Tensor, norm: float, limit: float) -> None:
    """Scale the gradient down to `limit`, as `torch.nn.utils.clip_grad_norm_`; 0 = never."""
    if limit > 0.0:
        factor = limit / (norm + 1e-6)
        if factor < 1.0:
            grad_P.mul_(factor)


def adamw_step(
    weights_P: Tensor,
    grad_P: Tensor,
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    step: int,
    params: AdamParams,
) -> None:
    """Make one step of torch's own fused AdamW over whole fp32 vectors [P], in place; `step` counts
    the steps made before this one."""
    adamw(
        [weights_P],
        [grad_P],
        [exp_avg_P],
        [exp_avg_sq_P],
        [],
        [torch.tensor(float(step), device=weights_P.device)],
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.lr,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )
