"""The adapter itself: a few vectors of one length, and views of them for each input group.

P parameters of the adapter, R rank (summed over an input group's members), K input features,
N output features, S shares of a pending gradient.
"""

import torch
from torch import Tensor

from manylora.kernels import Block, Member
from manylora.lora.layout import Factor, Layout, rows
from manylora.lora.sites import Site
from manylora.lora.state import AdapterState, Floats
from manylora.types import AdapterSpec

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_tensor(array: Floats, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of `array` on `device`, of its own memory."""
    return torch.tensor(array, dtype=dtype, device=device)


def to_array(tensor: Tensor) -> Floats:
    """A copy of `tensor` in host memory, fp32, of its own."""
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()


class AdapterWeights:
    """An adapter's factors as the layers read them: one vector and a block per input group.

    Frozen as a snapshot, or the living weights of an `Adapter`.

    Attributes:
        weights_P: the vector, in the adapter's dtype.
        spec, layout: the adapter's settings, and where its factors lie.
        blocks: input group → its factors, views of the vector.
    """

    def __init__(self, spec: AdapterSpec, layout: Layout, weights_P: Tensor, sites: "SiteIndex"):
        self.spec = spec
        self.layout = layout
        self.weights_P = weights_P
        self.blocks = {
            group: _block(factors, weights_P, sites) for group, factors in layout.groups()
        }

    def snapshot(self, sites: "SiteIndex") -> "AdapterWeights":
        """A frozen copy: one clone of the vector."""
        return AdapterWeights(self.spec, self.layout, self.weights_P.clone(), sites)


class SiteIndex:
    """Which output of its input group each site is."""

    def __init__(self, sites: tuple[Site, ...]):
        self.sites = sites
        self.members: dict[int, list[Site]] = {}
        self.output_of: dict[str, int] = {}
        for site in sites:
            members = self.members.setdefault(site.group, [])
            self.output_of[site.name] = len(members)
            members.append(site)


class Adapter:
    """A trainable adapter: factors, gradient, master weights and moments.

    In fp32 the weights are their own master copy, so an adapter costs 16 bytes a parameter once
    it has stepped: weights, gradient and two moments.

    Attributes:
        weights: the factors in the adapter's dtype, which the layers read.
        master_P: fp32, what the optimizer updates.
        grad_P: fp32, summed over every call since the last step; None until first needed.
        exp_avg_P, exp_avg_sq_P: fp32 moments; None before the first step.
        step: optimizer steps made.
        draws: pieces of work seen, the position in the random stream of dropout.
        has_grad: whether anything was accumulated since the last step.
        poison: why this step's gradients must not be used; None when they may.
    """

    def __init__(self, state: AdapterState, sites: SiteIndex, device: torch.device):
        dtype = TORCH_DTYPES[state.spec.dtype]
        self.spec, self.layout = state.spec, state.layout
        self.master_P = to_tensor(state.weights, device)
        living_P = self.master_P if dtype == torch.float32 else self.master_P.to(dtype)
        self.weights = AdapterWeights(state.spec, state.layout, living_P, sites)
        self.exp_avg_P = _tensor_or_none(state.exp_avg, device)
        self.exp_avg_sq_P = _tensor_or_none(state.exp_avg_sq, device)
        self.grad_P: Tensor | None = None
        self.step, self.draws = state.step, state.draws
        self.has_grad = False
        self.poison = state.poison
        if state.grad is not None:
            self._take_grad(state.grad)

    def require_grad(self) -> Tensor:
        """The gradient vector, made (as zeros) and tied to the blocks on first use."""
        return (
            self._tie_grad(torch.zeros_like(self.master_P)) if self.grad_P is None else self.grad_P
        )

    def _tie_grad(self, grad_P: Tensor) -> Tensor:
        self.grad_P = grad_P
        for group, factors in self.layout.groups():
            block = self.weights.blocks[group]
            block.grad_a_RK = _a_rows(factors, grad_P)
            for member, factor in zip(block.members, factors, strict=True):
                member.grad_bt_RN = factor.b_transposed(grad_P)
        return grad_P

    def _take_grad(self, grad_SP: Floats) -> None:
        """Begin with a pending gradient: its shares are added up in their order."""
        device = self.master_P.device
        grad_P = self._tie_grad(to_tensor(grad_SP[0], device))
        for share_P in grad_SP[1:]:
            grad_P.add_(to_tensor(share_P, device))
        self.has_grad = True

    def require_moments(self) -> tuple[Tensor, Tensor]:
        """AdamW's two moments, made (as zeros) on first use."""
        if self.exp_avg_P is None or self.exp_avg_sq_P is None:
            self.exp_avg_P = torch.zeros_like(self.master_P)
            self.exp_avg_sq_P = torch.zeros_like(self.master_P)
        return self.exp_avg_P, self.exp_avg_sq_P

    def drop_grad(self) -> None:
        """Forget what was accumulated."""
        if self.grad_P is not None:
            self.grad_P.zero_()
        self.has_grad, self.poison = False, None

    def publish(self) -> None:
        """Let the layers see the master weights after they have changed."""
        if self.weights.weights_P is not self.master_P:
            self.weights.weights_P.copy_(self.master_P)

    def state(self) -> AdapterState:
        """A detached copy, in numpy arrays, of everything that training needs to go on.

        Gradients that must not be used are left out, as the next step will be refused and drop
        them; that it will be is part of the state.
        """
        grad_P = self.grad_P if self.has_grad and self.poison is None else None
        return AdapterState(
            spec=self.spec,
            layout=self.layout,
            weights=to_array(self.master_P),
            exp_avg=_array_or_none(self.exp_avg_P),
            exp_avg_sq=_array_or_none(self.exp_avg_sq_P),
            grad=None if grad_P is None else to_array(grad_P)[None],
            step=self.step,
            draws=self.draws,
            poison=self.poison,
        )

    def num_bytes(self) -> int:
        """Bytes held by the adapter's vectors now."""
        vectors = [self.master_P, self.grad_P, self.exp_avg_P, self.exp_avg_sq_P]
        if self.weights.weights_P is not self.master_P:
            vectors.append(self.weights.weights_P)
        return sum(v.numel() * v.element_size() for v in vectors if v is not None)


def _block(factors: tuple[Factor, ...], vector_P: Tensor, sites: SiteIndex) -> Block:
    a_RK = _a_rows(factors, vector_P)
    members = []
    for factor in factors:
        bt_RN = factor.b_transposed(vector_P)
        members.append(Member(sites.output_of[factor.site], factor.rank, factor.scale, bt_RN))
    return Block(a_RK, tuple(members), [factor.rank for factor in factors])


def _tensor_or_none(array: Floats | None, device: torch.device) -> Tensor | None:
    return None if array is None else to_tensor(array, device)


def _array_or_none(tensor: Tensor | None) -> Floats | None:
    return None if tensor is None else to_array(tensor)


def _a_rows(factors: tuple[Factor, ...], vector_P: Tensor) -> Tensor:
    """The adjacent A factors of one input group as one [R, K] view."""
    rank, in_features = sum(f.rank for f in factors), factors[0].in_features
    return rows(vector_P, factors[0].a_start, rank, in_features)
