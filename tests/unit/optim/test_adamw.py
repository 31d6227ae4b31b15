"""The optimizer's arithmetic against torch's own, on vectors.

P parameters.
"""

import pytest
import torch

from manylora.optim import adamw_step, clip_, gradient_norms, norms
from manylora.parallel import Mesh
from manylora.types import AdamParams
from manylora.types.mesh_shape import MeshShape

P = 999


def vectors(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, P, generator=generator))


@pytest.mark.parametrize(
    "params",
    [
        AdamParams(lr=1e-2),
        AdamParams(lr=1e-2, beta1=0.5, beta2=0.9, eps=1e-4, weight_decay=0.3),
        AdamParams(lr=0.0),
    ],
)
def test_adamw_is_torchs(params: AdamParams):
    weights_P, *grads = vectors(0, 6)
    parameter = torch.nn.Parameter(weights_P.clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=params.lr,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
        foreach=False,
    )
    exp_avg_P, exp_avg_sq_P = torch.zeros(P), torch.zeros(P)
    for step, grad_P in enumerate(grads):
        parameter.grad = grad_P.clone()
        optimizer.step()
        adamw_step(weights_P, grad_P, exp_avg_P, exp_avg_sq_P, step, params)
        torch.testing.assert_close(weights_P, parameter.detach(), rtol=1e-6, atol=1e-6)
    state = optimizer.state[parameter]
    torch.testing.assert_close(exp_avg_P, state["exp_avg"])
    torch.testing.assert_close(exp_avg_sq_P, state["exp_avg_sq"])


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_is_torchs(limit: float):
    (grad_P,) = vectors(1, 1)
    parameter = torch.nn.Parameter(torch.zeros(P))
    parameter.grad = grad_P.clone()
    expected = torch.nn.utils.clip_grad_norm_([parameter], limit or float("inf"))
    (norm,) = gradient_norms([grad_P])
    clip_(grad_P, norm, limit)
    assert norm == pytest.approx(float(expected))
    torch.testing.assert_close(grad_P, parameter.grad)


def test_norms_come_in_order():
    grads = [torch.full((4,), float(i)) for i in range(5)]
    assert list(gradient_norms(grads)) == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_one_fused_step_of_zero_gradient_only_decays():
    weights_P = torch.ones(P)
    grad_P, exp_avg_P, exp_avg_sq_P = torch.zeros(3, P)
    params = AdamParams(lr=0.1, weight_decay=0.5)
    adamw_step(weights_P, grad_P, exp_avg_P, exp_avg_sq_P, 0, params)
    torch.testing.assert_close(weights_P, torch.full((P,), 0.95))


def test_one_process_makes_each_norm_when_the_step_comes_to_it():
    """In fp32, while the gradient is in cache; a mesh of several makes all at once, in fp64."""
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(1001, generator=generator) for _ in range(3)]
    expected = [torch.linalg.vector_norm(grad).item() for grad in grads]
    found = iter(norms([], grads, Mesh.join(MeshShape(), "cpu")))
    assert [next(found), next(found)] == expected[:2]
    grads[2].zero_()
    assert list(found) == [0.0]
