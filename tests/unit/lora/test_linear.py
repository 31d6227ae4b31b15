"""Wrapped linear layers: the base's numbers outside a stream, one pass per input group inside.

T rows of the stream, K input features, N output features.
"""

import pytest
import torch
from torch import nn

from manylora.lora.adapter import Adapter, SiteIndex
from manylora.lora.init import fresh_state
from manylora.lora.layout import plan_layout
from manylora.lora.linear import LoRALinear, wrap_linears
from manylora.lora.routing import RoutingTable, Segment, routing
from manylora.lora.sites import Site, resolve_targets
from manylora.types import AdapterSpec, Unsupported

T, K = 12, 8
SITES = (Site("q", K, 6, 0), Site("k", K, 4, 0), Site("o", 6, K, 1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = nn.Linear(K, 6), nn.Linear(K, 4, bias=False), nn.Linear(6, K)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x).sum(-1, keepdim=True))


def wrapped_block() -> Block:
    block = Block()
    wrap_linears(block, SITES)
    return block


def acting(targets: tuple[str, ...], seed: int) -> Adapter:
    spec = AdapterSpec(rank=2, alpha=3, targets=targets, seed=seed)
    state = fresh_state(spec, plan_layout(spec, resolve_targets(spec, SITES)))
    generator = torch.Generator().manual_seed(seed)
    state.weights += 0.2 * torch.randn(state.weights.shape, generator=generator).numpy()
    adapter = Adapter(state, SiteIndex(SITES), torch.device("cpu"))
    adapter.require_grad()
    return adapter


def test_outside_a_stream_it_is_the_base():
    x_TK = torch.randn(T, K)
    assert torch.equal(wrapped_block()(x_TK), Block()(x_TK))


def test_the_wrapping_holds_no_parameters():
    names = {name.replace(".base", "") for name, _ in wrapped_block().named_parameters()}
    assert names == {name for name, _ in Block().named_parameters()}
    assert isinstance(wrapped_block().q, LoRALinear)
    assert torch.equal(wrapped_block().q.weight, Block().q.weight)


@pytest.mark.parametrize("needs_x", [True, False])
def test_forward_and_every_gradient_against_autograd(needs_x: bool):
    """Two adapters and bare rows; the gradient of x flows through A, and through the base."""
    x_TK = torch.randn(T, K, requires_grad=needs_x)
    one, two = acting(("q", "k", "o"), 1), acting(("k",), 2)
    segments = [Segment(5, one.weights), Segment(3, None), Segment(4, two.weights)]
    with routing(RoutingTable(segments, training=True)):
        out = wrapped_block()(x_TK.unsqueeze(0))[0]
        out.square().sum().backward()
    found_x = x_TK.grad

    x2_TK = x_TK.detach().clone().requires_grad_()
    expected, leaves = zip(
        *(
            by_hand(x2_TK[rows], adapter)
            for rows, adapter in ((slice(0, 5), one), (slice(5, 8), None), (slice(8, 12), two))
        ),
        strict=True,
    )
    expected_TK = torch.cat(expected)
    torch.testing.assert_close(out, expected_TK)
    expected_TK.square().sum().backward()
    if needs_x:
        assert found_x is not None and x2_TK.grad is not None
        assert (found_x - x2_TK.grad).norm() < 1e-5 * x2_TK.grad.norm()
    for adapter, leaf_P in ((one, leaves[0]), (two, leaves[2])):
        assert (adapter.require_grad() - leaf_P.grad).norm() < 1e-5 * leaf_P.grad.norm()


def by_hand(x: torch.Tensor, adapter: Adapter | None) -> tuple[torch.Tensor, torch.Tensor]:
    block = Block()
    vector_P = torch.zeros(1) if adapter is None else adapter.master_P.clone()
    vector_P.requires_grad_()
    factors = {} if adapter is None else {f.site: f for f in adapter.layout.factors}

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        y = block.get_submodule(name)(value)
        if name in factors:
            f = factors[name]
            y = y + f.scale * value @ f.a(vector_P).t() @ f.b_transposed(vector_P)
        return y

    out = linear("o", torch.tanh(linear("q", x)) * linear("k", x).sum(-1, keepdim=True))
    return out, vector_P


def test_a_group_is_computed_once_for_one_input():
    block, x_TK = wrapped_block(), torch.randn(1, T, K)
    table = RoutingTable([Segment(T, None)], training=False)
    with torch.no_grad(), routing(table):
        q_TN = block.q(x_TK)
        assert list(table.pending) == [0]
        block.k(x_TK)
        assert table.pending == {}
        block.q(x_TK)
        other = block.k(2 * x_TK)  # another tensor: nothing of the first may be used
        assert torch.equal(other, nn.functional.linear(2 * x_TK, block.k.weight))
        assert torch.equal(q_TN, Block().q(x_TK))


def test_only_plain_linear_layers_are_wrapped():
    block = Block()
    setattr(block, "q", nn.Bilinear(2, 2, 2))  # noqa: B010 - of another type than declared
    with pytest.raises(Unsupported, match="q is a Bilinear"):
        wrap_linears(block, SITES)
