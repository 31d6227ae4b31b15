"""An adapter's borders: numpy states outside, torch inside, and no memory in common.

Faults that were planted and seen to fail here: `from_numpy` without a copy on the way in, a view of
the vector on the way out, only the first share of a gradient taken, shares added in another order.
"""

import numpy as np
import pytest
import torch

from manylora.lora.adapter import Adapter, SiteIndex, to_array
from manylora.lora.gathering import gathered_state
from manylora.lora.init import fresh_state
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState, Floats
from manylora.parallel import Mesh
from manylora.types import AdapterSpec
from manylora.types.mesh_shape import MeshShape

SITES = (Site("q", 8, 6, 0), Site("k", 8, 4, 0), Site("o", 6, 8, 1))
CPU = torch.device("cpu")
VECTORS = ("weights", "exp_avg", "exp_avg_sq", "grad")


def some_state(shares: int = 1, **settings) -> AdapterState:
    spec = AdapterSpec(rank=3, **settings)
    layout = plan_layout(spec, resolve_targets(spec, SITES))
    draw = np.random.default_rng(shares)

    def vector(*shape: int) -> Floats:
        return draw.normal(size=(*shape, layout.num_params)).astype(np.float32)

    return AdapterState(spec, layout, vector(), vector(), vector() ** 2, vector(shares), 4, 9)


def state_of(adapter: Adapter) -> AdapterState:
    return gathered_state(adapter, Mesh.join(MeshShape(), CPU))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_state_goes_in_and_comes_out_as_it_was(dtype):
    state = some_state(dtype=dtype)
    found = state_of(Adapter(state, SiteIndex(SITES), CPU))
    for name in VECTORS:
        one, other = getattr(found, name), getattr(state, name)
        assert one.dtype == np.float32 and one.shape == other.shape, name
        assert np.array_equal(one, other), name
    assert (found.step, found.draws, found.poison) == (4, 9, None)
    assert found.spec is state.spec and found.layout is state.layout


def test_neither_side_follows_the_other():
    state = some_state()
    kept = {name: getattr(state, name).copy() for name in VECTORS}
    adapter = Adapter(state, SiteIndex(SITES), CPU)
    given = state_of(adapter)
    for name in VECTORS:
        getattr(state, name).fill(7)  # the caller's own
        assert np.array_equal(getattr(state_of(adapter), name), kept[name]), name
    for tensor in (adapter.master_P, adapter.require_grad(), *adapter.require_moments()):
        tensor.fill_(5)
    for name in VECTORS:
        assert np.array_equal(getattr(given, name), kept[name]), name
        assert getattr(given, name).flags.writeable, name


def test_arrays_that_may_only_be_read_are_taken():
    """As they come out of a message or a shared file; a warning would be an error here."""
    state = some_state()
    for name in VECTORS:
        getattr(state, name).flags.writeable = False
    found = state_of(Adapter(state, SiteIndex(SITES), CPU))
    assert np.array_equal(found.weights, state.weights)


def test_shares_of_a_gradient_are_added_in_their_order():
    state = some_state(shares=3)
    assert state.grad is not None
    state.grad[:] *= np.array([[1], [1e8], [-1e8]], np.float32)  # the order shows
    adapter = Adapter(state, SiteIndex(SITES), CPU)
    expected_P = (state.grad[0] + state.grad[1]) + state.grad[2]
    assert not np.array_equal(expected_P, state.grad[0] + (state.grad[1] + state.grad[2]))
    found = state_of(adapter).grad
    assert found is not None and found.shape == (1, state.layout.num_params)
    assert np.array_equal(found[0], expected_P)
    # The layers write into the same vector.
    member = adapter.weights.blocks[0].members[0]
    assert member.grad_bt_RN is not None
    member.grad_bt_RN.zero_()
    again = state_of(adapter).grad
    assert again is not None
    assert not state.layout.factors[0].b_transposed(again[0]).any()


def test_a_state_without_a_gradient_has_none():
    spec = AdapterSpec(rank=2)
    fresh = fresh_state(spec, plan_layout(spec, resolve_targets(spec, SITES)))
    adapter = Adapter(fresh, SiteIndex(SITES), CPU)
    assert (adapter.grad_P, adapter.exp_avg_P, adapter.has_grad) == (None, None, False)
    found = state_of(adapter)
    assert (found.grad, found.exp_avg, found.exp_avg_sq) == (None, None, None)


def test_half_precision_leaves_as_fp32():
    tensor = torch.randn(5).bfloat16()
    assert np.array_equal(to_array(tensor), tensor.float().numpy())
