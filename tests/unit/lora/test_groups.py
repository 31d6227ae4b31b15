"""A group of another kind beside the linear ones, by the interface alone.

T rows of the stream, K input features, N output features.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from manylora.kernels import PackedWeight
from manylora.lora.groups import Adapted, Group, GroupFunction, Saved, groups_of
from manylora.lora.linear import LoRALinear, wrap_linears
from manylora.lora.routing import RoutingTable, Segment, routing
from manylora.lora.sites import Site

T, K, N = 6, 4, 3


class SignedGroup:
    """Two matrices, of which each row is multiplied by the one that the sign of its sum names."""

    def __init__(self, number: int):
        generator = torch.Generator().manual_seed(0)
        self.number = number
        self.weight_2NK = torch.randn(2, N, K, generator=generator)
        self.sites: Sequence[Site] = [Site("mixed", K, N, number)]
        self.layers: Sequence[nn.Linear] = []
        self.packed: Sequence[PackedWeight] = []

    def outputs(self, x: Tensor, table: RoutingTable) -> Sequence[Tensor]:
        return GroupFunction.apply(x, None, self, table)

    def products(self, x: Tensor, table: RoutingTable) -> tuple[tuple[Tensor, ...], Saved]:
        chosen_TNK = self.weight_2NK[(x.sum(-1) > 0).long()]
        return (torch.einsum("...nk,...k->...n", chosen_TNK, x),), (chosen_TNK,)

    def gradient(
        self, dys: Sequence[Tensor | None], saved: Saved, table: RoutingTable, *, wanted: bool
    ) -> Tensor | None:
        (dy,) = dys
        if dy is None or not wanted:
            return None
        return torch.einsum("...nk,...n->...k", saved[0], dy).reshape(-1, K)

    def pack(self) -> None:
        raise NotImplementedError


class Mixed(Adapted):
    """What stands in the model for such a group."""

    def forward(self, x: Tensor) -> Tensor:
        return self.group.outputs(x, RoutingTable([Segment(T, None)], training=True))[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(K, K)
        self.mixed = Mixed(SignedGroup(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.linear(x))


@pytest.fixture
def model() -> Model:
    model = Model().requires_grad_(False)
    wrap_linears(model, [Site("linear", K, K, 2)])
    return model


def test_groups_are_found_by_number_whatever_their_kind(model: Model):
    found: dict[int, Group] = groups_of(model)
    assert sorted(found) == [2, 7]
    assert [site.name for number in (2, 7) for site in found[number].sites] == ["linear", "mixed"]
    assert isinstance(model.linear, LoRALinear) and found[2] is model.linear.group
    assert groups_of(nn.Linear(2, 2)) == {}


def test_autograd_asks_a_group_for_its_gradient(model: Model):
    x_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with routing(RoutingTable([Segment(T, None)], training=True)):
        model(x_TK).square().sum().backward()
    plain_TK = x_TK.detach().clone().requires_grad_()
    hidden_TK = nn.functional.linear(plain_TK, model.linear.weight, model.linear.bias)
    group = model.mixed.group
    assert isinstance(group, SignedGroup)
    chosen_TNK = group.weight_2NK[(hidden_TK.sum(-1) > 0).long()]
    torch.einsum("tnk,tk->tn", chosen_TNK, hidden_TK).square().sum().backward()
    assert x_TK.grad is not None and plain_TK.grad is not None
    torch.testing.assert_close(x_TK.grad, plain_TK.grad)
