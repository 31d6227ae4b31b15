"""The vector's layout: complete, without overlap, A factors of an input group adjacent.

P parameters, K input features, N output features, R rank.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from manylora.lora.adapter import Adapter, SiteIndex
from manylora.lora.init import fresh_state
from manylora.lora.layout import Layout, plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import Floats
from manylora.types import AdapterSpec
from manylora.types.adapter_spec import Init

LAYER = [
    ("attn.q_proj", 8, 12, 0),
    ("attn.k_proj", 8, 4, 0),
    ("attn.v_proj", 8, 4, 0),
    ("attn.o_proj", 12, 8, 1),
    ("mlp.up_proj", 8, 20, 2),
    ("mlp.down_proj", 20, 8, 3),
]
SITES = (
    *(
        Site(f"model.layers.{layer}.{name}", k, n, group=10 * layer + group)
        for layer in range(2)
        for name, k, n, group in LAYER
    ),
    Site("lm_head", 8, 30, group=99, is_head=True),
)

SPECS = [
    AdapterSpec(rank=3),
    AdapterSpec(rank=2, targets=("q_proj", "v_proj", "lm_head")),
    AdapterSpec(rank=1, rank_pattern={"k_proj": 5, r"layers\.1\..*proj": 2}),
]


def layout_of(spec: AdapterSpec) -> Layout:
    return plan_layout(spec, resolve_targets(spec, SITES))


@pytest.mark.parametrize("spec", SPECS)
def test_every_number_belongs_to_exactly_one_factor(spec: AdapterSpec):
    layout = layout_of(spec)
    owners_P = torch.zeros(layout.num_params)
    for factor in layout.factors:
        factor.a(owners_P).add_(1)
        factor.b_transposed(owners_P).add_(1)
        assert factor.a(owners_P).shape == (factor.rank, factor.in_features)
        assert factor.b_transposed(owners_P).shape == (factor.rank, factor.out_features)
    assert torch.equal(owners_P, torch.ones(layout.num_params))


@pytest.mark.parametrize("spec", SPECS)
def test_numpy_and_torch_vectors_are_viewed_alike(spec: AdapterSpec):
    layout = layout_of(spec)
    array_P = np.arange(layout.num_params, dtype=np.float32)
    tensor_P = torch.arange(layout.num_params, dtype=torch.float32)
    for factor in layout.factors:
        for of in (factor.a, factor.b_transposed):
            assert np.array_equal(of(array_P), of(tensor_P).numpy())
            assert np.shares_memory(of(array_P), array_P)
            of(array_P)[...] = -1
            of(tensor_P).fill_(-1)
    assert (array_P == -1).all() and tensor_P.eq(-1).all()


@pytest.mark.parametrize("spec", SPECS)
def test_a_groups_a_factors_are_one_matrix(spec: AdapterSpec):
    layout = layout_of(spec)
    seen = []
    for group, factors in layout.groups():
        seen.append(group)
        for left, right in pairwise(factors):
            assert right.a_start == left.a_start + left.rank * left.in_features
        last = factors[-1]
        assert factors[0].b_start == last.a_start + last.rank * last.in_features
    assert len(seen) == len(set(seen))


def test_blocks_are_views_of_the_vector():
    """What the optimizer writes into the vector is what the layers read, and gradients return."""
    spec = SPECS[1]
    adapter = Adapter(fresh_state(spec, layout_of(spec)), SiteIndex(SITES), torch.device("cpu"))
    grad_P = adapter.require_grad()
    adapter.master_P.copy_(torch.arange(adapter.layout.num_params))
    block = adapter.weights.blocks[0]
    assert [(m.output, m.rank) for m in block.members] == [(0, 2), (2, 2)]  # q and v, k left out
    q, v = adapter.layout.factors[:2]
    assert torch.equal(block.a_RK, torch.cat([q.a(adapter.master_P), v.a(adapter.master_P)]))
    assert torch.equal(block.members[1].bt_RN, v.b_transposed(adapter.master_P))
    assert block.grad_a_RK is not None and block.members[1].grad_bt_RN is not None
    block.grad_a_RK.fill_(1)
    block.members[1].grad_bt_RN.fill_(2)
    assert v.a(grad_P).eq(1).all() and v.b_transposed(grad_P).eq(2).all()
    assert q.b_transposed(grad_P).eq(0).all()


def test_scale_follows_rank_and_alpha_of_the_module():
    spec = AdapterSpec(
        rank=4, alpha=8, rank_pattern={"q_proj": 16}, alpha_pattern={"q_proj": 4.0}, use_rslora=True
    )
    scales = {f.site.split(".")[-1]: f.scale for f in layout_of(spec).factors}
    assert scales["q_proj"] == 1.0 and scales["up_proj"] == 4.0


# --- first values ------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_first_values(init: Init):
    sites = [Site("wide", 400, 300, 0)]
    spec = AdapterSpec(rank=50, targets=("wide",), init=init)
    state = fresh_state(spec, plan_layout(spec, resolve_targets(spec, sites)))
    (factor,) = state.layout.factors
    a_RK = factor.a(state.weights)
    assert not factor.b_transposed(state.weights).any()
    assert (state.step, state.draws, state.exp_avg, state.grad) == (0, 0, None, None)
    if init == "kaiming":
        assert 0.999 / 20 < float(np.abs(a_RK).max()) <= 1 / 20  # ±1/√K
        assert float(a_RK.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    else:
        assert float(a_RK.std()) == pytest.approx(1 / 50, rel=0.02)  # 1/R, as PEFT


def test_kaiming_is_pefts():
    a_RK = torch.empty(64, 100)
    torch.nn.init.kaiming_uniform_(a_RK, a=5**0.5)
    assert float(a_RK.abs().max()) == pytest.approx(0.1, rel=0.01)


def test_first_values_depend_on_seed_and_module_only():
    def a_of(spec: AdapterSpec, site: str) -> Floats:
        state = fresh_state(spec, layout_of(spec))
        return next(f for f in state.layout.factors if f.site.endswith(site)).a(state.weights)

    few = AdapterSpec(rank=2, targets=("v_proj",), seed=5)
    many = AdapterSpec(rank=2, seed=5, dtype="bf16")
    assert np.array_equal(a_of(few, "1.attn.v_proj"), a_of(many, "1.attn.v_proj"))
    other = AdapterSpec(rank=2, seed=6)
    assert not np.array_equal(a_of(many, "1.attn.v_proj"), a_of(other, "1.attn.v_proj"))
    assert not np.array_equal(a_of(many, "1.attn.v_proj"), a_of(many, "1.attn.k_proj"))


def test_half_precision_factors_are_rounded_masters():
    spec = AdapterSpec(rank=3, dtype="bf16")
    adapter = Adapter(fresh_state(spec, layout_of(spec)), SiteIndex(SITES), torch.device("cpu"))
    assert adapter.weights.weights_P.dtype == torch.bfloat16
    adapter.master_P.add_(1e-4)
    adapter.publish()
    assert torch.equal(adapter.weights.weights_P, adapter.master_P.bfloat16())
    assert adapter.master_P.dtype == torch.float32
