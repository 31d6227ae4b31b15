"""An adapter is a few vectors of one length, with views of them for each input group.

On a mesh these are what one rank holds (see `sharding`).

P parameters of the adapter that this rank holds, R rank (summed over an input group's members),
K input features, N output features, S rows of a pending gradient.
"""

from collections import Counter

import torch
from torch import Tensor

from manylora.kernels import DTYPES, Block, SiteFactor
from manylora.lora.layout import Factor, rows
from manylora.lora.sharding import ALONE, Part, Place, part_of
from manylora.lora.sites import Site
from manylora.lora.state import AdapterState, Floats
from manylora.types import AdapterSpec
from manylora.types.memory import adapter_bytes


def to_tensor(array: Floats, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Copy `array` to memory of its own on `device`."""
    return torch.tensor(array, dtype=dtype, device=device)


def to_array(tensor: Tensor) -> Floats:
    """Copy `tensor` to host memory of its own, in fp32."""
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()


class AdapterWeights:
    """`AdapterWeights` are factors as the layers read them: a vector, and a block per input group.

    They are frozen as a snapshot, or the living weights of an `Adapter`.

    Attributes:
        weights_P: the vector, in the adapter's dtype.
        spec: the adapter's settings.
        layout: where its factors lie in a state.
        part: what this rank holds, and where that lies in the vector.
        blocks: input group → its factors, views of the vector.
    """

    def __init__(self, spec: AdapterSpec, part: Part, weights_P: Tensor, sites: "SiteIndex"):
        self.spec = spec
        self.layout = part.whole
        self.part = part
        self.weights_P = weights_P
        self.blocks = {
            group: _block(factors, weights_P, sites) for group, factors in part.local.groups()
        }

    @property
    def num_bytes(self) -> int:
        """The vector takes this many bytes."""
        return self.weights_P.numel() * self.weights_P.element_size()

    def snapshot(self, sites: "SiteIndex") -> "AdapterWeights":
        """Return a frozen copy: one clone of the vector."""
        return AdapterWeights(self.spec, self.part, self.weights_P.clone(), sites)


class SiteIndex:
    """The index says which output of its input group each site is, and which rank this is."""

    def __init__(self, sites: tuple[Site, ...], place: Place = ALONE):
        self.sites = sites
        self.place = place
        self.output_of: dict[str, int] = {}
        outputs = Counter[int]()
        for site in sites:
            self.output_of[site.name] = outputs[site.group]
            outputs[site.group] += 1


class Adapter:
    """An `Adapter` can be trained: it has factors, gradient, master weights and moments.

    In fp32 the weights are their own master copy, so an adapter costs 16 bytes a parameter once
    it has stepped: weights, gradient and two moments.

    With several dp ranks `master_P` and the moments are this rank's slice only.

    Attributes:
        weights: the factors in the adapter's dtype, which the layers read.
        layout: where the factors lie in a state.
        part: what this rank holds of them.
        master_P: fp32, what the optimizer updates.
        grad_P: fp32, summed over every call since the last step; None until first needed.
        exp_avg_P: fp32, the first moment; None before the first step.
        exp_avg_sq_P: fp32, the second.
        step: optimizer steps made.
        draws: pieces of work seen, the position in the random stream of dropout.
        has_grad: whether anything was accumulated since the last step, on any rank.
        home: the dp rank of the first share of what was accumulated; None = nothing was.
        shares: how many shares that is.
        poison: why this step's gradients must not be used; None when they may.
    """

    def __init__(self, state: AdapterState, sites: SiteIndex, device: torch.device, home: int = 0):
        """`home` is where a pending gradient's first share goes."""
        dtype = DTYPES[state.spec.dtype]
        self.spec, self.layout = state.spec, state.layout
        self.part = part = part_of(state.layout, sites.sites, sites.place)
        whole_P = to_tensor(part.take(state.weights), device)
        living_P = whole_P if dtype == torch.float32 else whole_P.to(dtype)
        self.weights = AdapterWeights(state.spec, part, living_P, sites)
        self.master_P = whole_P
        if sites.place["dp"].size > 1:
            # Of fp32 weights a view, of others a copy that does not keep the rest alive.
            slice_C = whole_P[part.own]
            self.master_P = slice_C if living_P is whole_P else slice_C.clone()
        self.exp_avg_P = self._moment(state.exp_avg)
        self.exp_avg_sq_P = self._moment(state.exp_avg_sq)
        self.grad_P: Tensor | None = None
        self.step, self.draws = state.step, state.draws
        self.has_grad = False
        self.home: int | None = None
        self.shares = 0
        self.poison = state.poison
        if state.grad is not None:
            self.note_grad(home, part.shares(len(state.grad)))
            own_P = part.take_pending(state.grad, home)  # its rows, added up in their order
            if own_P is not None:
                self._tie_grad(to_tensor(own_P, self.master_P.device))

    def _moment(self, array: Floats | None) -> Tensor | None:
        if array is None:
            return None
        return to_tensor(self.part.take(array)[self.part.own], self.master_P.device)

    def require_grad(self) -> Tensor:
        """Return the gradient vector, made (as zeros) and tied to the blocks on first use."""
        if self.grad_P is None:
            return self._tie_grad(torch.zeros_like(self.weights.weights_P, dtype=torch.float32))
        return self.grad_P

    def _tie_grad(self, grad_P: Tensor) -> Tensor:
        self.grad_P = grad_P
        for group, factors in self.part.local.groups():
            block = self.weights.blocks[group]
            block.grad_a_RK = _a_rows(factors, grad_P)
            for member, factor in zip(block.members, factors, strict=True):
                member.grad_bt_RN = factor.b_transposed(grad_P)
        return grad_P

    def note_grad(self, home: int, shares: int) -> None:
        """Note that something was accumulated, on this rank or another."""
        self.has_grad, self.home = True, home
        self.shares = max(self.shares, shares)

    def share_ranks(self) -> list[int]:
        """Return the dp ranks that hold what was accumulated, in the order of the shares."""
        home = self.home or 0
        return [(home + share) % self.part.place["dp"].size for share in range(self.shares)]

    def require_moments(self) -> tuple[Tensor, Tensor]:
        """Return AdamW's two moments, made (as zeros) on first use."""
        if self.exp_avg_P is None or self.exp_avg_sq_P is None:
            self.exp_avg_P = torch.zeros_like(self.master_P)
            self.exp_avg_sq_P = torch.zeros_like(self.master_P)
        return self.exp_avg_P, self.exp_avg_sq_P

    @property
    def has_usable_grad(self) -> bool:
        """The next step may use what was accumulated."""
        return self.has_grad and self.poison is None

    def drop_grad(self) -> None:
        """Forget what was accumulated."""
        if self.grad_P is not None:
            self.grad_P.zero_()
        self.has_grad, self.poison = False, None
        self.home, self.shares = None, 0

    def publish(self) -> None:
        """Let the layers see the master weights after they have changed; not for dp slices."""
        if self.weights.weights_P is not self.master_P:
            self.weights.weights_P.copy_(self.master_P)

    def num_bytes(self) -> int:
        """Return the bytes that the adapter's vectors hold now."""
        vectors = [self.weights.weights_P, self.grad_P, self.exp_avg_P, self.exp_avg_sq_P]
        if self.spec.dtype != "fp32":
            vectors.append(self.master_P)
        return sum(v.numel() * v.element_size() for v in vectors if v is not None)

    def promised_bytes(self) -> int:
        """Return the bytes that the adapter does not hold yet, and will once it has stepped."""
        count, dp = self.weights.weights_P.numel(), self.part.place["dp"].size
        return max(0, adapter_bytes(count, self.spec.dtype, dp) - self.num_bytes())


def _block(factors: tuple[Factor, ...], vector_P: Tensor, sites: SiteIndex) -> Block:
    a_RK = _a_rows(factors, vector_P)
    members = []
    for factor in factors:
        bt_RN = factor.b_transposed(vector_P)
        members.append(SiteFactor(sites.output_of[factor.site], factor.rank, factor.scale, bt_RN))
    return Block(a_RK, tuple(members), [factor.rank for factor in factors])


def _a_rows(factors: tuple[Factor, ...], vector_P: Tensor) -> Tensor:
    """Return the adjacent A factors of one input group as one [R, K] view."""
    rank, in_features = sum(f.rank for f in factors), factors[0].in_features
    return rows(vector_P, factors[0].a_start, rank, in_features)
