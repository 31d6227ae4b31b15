"""Parts of an adapter: what each rank takes of a global vector, and putting it together again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.lora.layout import plan_layout
from manylora.lora.sharding import Coordinate, Part, Place, part_of
from manylora.lora.sites import Site, resolve_targets
from manylora.parallel import share
from manylora.types import AdapterSpec
from manylora.types.mesh_shape import Split

LAYER: list[tuple[str, int, int, int, Split]] = [
    ("attn.q_proj", 8, 12, 0, "column"),
    ("attn.k_proj", 8, 4, 0, "column"),
    ("attn.v_proj", 8, 4, 0, "column"),
    ("attn.o_proj", 12, 8, 1, "row"),
    ("mlp.router", 8, 3, 2, "whole"),
    ("mlp.up_proj", 8, 20, 3, "column"),
    ("mlp.down_proj", 20, 8, 4, "row"),
]
SITES = (
    *(
        Site(f"model.layers.{layer}.{name}", k, n, group=10 * layer + group, split=split)
        for layer in range(2)
        for name, k, n, group, split in LAYER
    ),
    Site("lm_head", 8, 30, group=99, is_head=True, split="column"),
)
SPECS = [
    AdapterSpec(rank=3),
    AdapterSpec(rank=2, targets=("q_proj", "v_proj", "lm_head")),
    AdapterSpec(rank=1, rank_pattern={"k_proj": 5, r"layers\.1\..*proj": 2}),
    AdapterSpec(rank=16, targets=("router", "o_proj")),
    AdapterSpec(rank=2, targets=("router",)),
]
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)


def parts_of(spec: AdapterSpec, tp: int, dp: int = 1, dp_index: int = 0) -> list[Part]:
    layout = plan_layout(spec, resolve_targets(spec, SITES))
    places = [
        Place({"dp": Coordinate(dp, dp_index), "tp": Coordinate(tp, index)}) for index in range(tp)
    ]
    return [part_of(layout, SITES, place) for place in places]


def random_P(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_taken_apart_is_put_together(spec: AdapterSpec, tp: int):
    parts = parts_of(spec, tp)
    vector_P = random_P(parts[0].whole.num_params)
    locals_L = [part.take(vector_P) for part in parts]
    for part in parts:
        assert np.array_equal(part.join(locals_L), vector_P)
    # Each number of the vector is somewhere, and the whole factors' everywhere.
    whole = parts[0].num_whole
    assert max(map(len, locals_L)) == len(locals_L[0]) == parts[-1].longest
    assert whole + sum(len(one) - whole for one in locals_L) == len(vector_P)
    for one in locals_L:
        assert np.array_equal(one[:whole], locals_L[0][:whole])


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_each_factor_is_the_part_that_its_layer_is(spec: AdapterSpec, tp: int):
    splits = {site.name: site.split for site in SITES}
    parts = parts_of(spec, tp)
    vector_P = random_P(parts[0].whole.num_params)
    for index, part in enumerate(parts):
        local_L = part.take(vector_P)
        for own, its in zip(part.local.factors, part.whole.factors, strict=True):
            a, b = its.a(vector_P), its.b_transposed(vector_P)
            if splits[own.site] == "column":
                b = b[:, slice(*share(its.out_features, tp, index))]
            if splits[own.site] == "row":
                a = a[:, slice(*share(its.in_features, tp, index))]
            assert np.array_equal(own.a(local_L), a)
            assert np.array_equal(own.b_transposed(local_L), b)


@pytest.mark.parametrize("spec", SPECS)
def test_a_groups_a_factors_stay_one_matrix_and_whole_ones_lie_in_front(spec: AdapterSpec):
    splits = {site.name: site.split for site in SITES}
    for part in parts_of(spec, 4):
        owners_L = np.zeros(part.local.num_params)
        for _, factors in part.local.groups():
            offset = factors[0].a_start
            for factor in factors:
                assert factor.a_start == offset
                offset += factor.rank * factor.in_features
        for factor in part.local.factors:
            factor.a(owners_L)[...] += 1
            factor.b_transposed(owners_L)[...] += 1
            assert (factor.a_start < part.num_whole) == (splits[factor.site] != "row")
            assert (factor.b_start < part.num_whole) == (splits[factor.site] != "column")
        assert np.array_equal(owners_L, np.ones_like(owners_L))
        repeated = sum(stop - start for start, stop in part.repeated)
        routers = [f for f in part.local.factors if f.site.endswith("router")]
        assert repeated == sum(f.rank * (f.in_features + f.out_features) for f in routers)


@EXAMPLES
@given(st.sampled_from(SPECS), st.sampled_from([1, 2, 4]), st.integers(1, 7))
def test_slices_cover_the_local_vector(spec: AdapterSpec, tp: int, dp: int):
    for number, alone in enumerate(parts_of(spec, tp)):
        covered = np.zeros(alone.local.num_params, np.int64)
        for index in range(dp):
            part = parts_of(spec, tp, dp, index)[number]
            covered[part.own] += 1
            # At the same place on every tp rank, also where one has less.
            assert part.slice_size == parts_of(spec, tp, dp, index)[0].slice_size
            assert part.own.start == min(index * part.slice_size, len(covered))
            assert part.own.stop - part.own.start <= part.slice_size
        assert np.all(covered == 1)


@EXAMPLES
@given(st.integers(0, 50), st.integers(1, 6))
def test_features_are_shared_as_the_base_is_cut(count: int, size: int):
    ends = np.cumsum([0, *map(len, torch.arange(count).chunk(size))]).tolist()
    ends += [count] * (size + 1 - len(ends))
    for index in range(size):
        assert share(count, size, index) == (ends[index], ends[index + 1])


def lanes_of(
    parts: list[list[Part]], grad_SP: np.ndarray, home: int
) -> dict[tuple[int, int], np.ndarray]:
    """What every rank takes: (share, tp index) → [L]."""
    dp = len(parts)
    lanes = {}
    for number in range(parts[0][0].shares(len(grad_SP))):
        for index, part in enumerate(parts[(home + number) % dp]):
            own_L = part.take_pending(grad_SP, home)
            assert own_L is not None
            lanes[number, index] = own_L
    return lanes


@EXAMPLES
@given(
    st.sampled_from(SPECS),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]),
    st.integers(0, 3),
    st.integers(1, 4),
)
def test_a_pending_gradient_survives_every_mesh(spec, first, second, home: int, shares: int):
    """On its own mesh to the bit; on another as the same sum."""
    dp, tp = first
    parts = [parts_of(spec, tp, dp, index) for index in range(dp)]
    lanes = {
        (number, index): random_P(parts[0][index].local.num_params, 10 * number + index)
        for number in range(min(shares, dp))
        for index in range(tp)
    }
    for (number, _), lane_L in lanes.items():
        for start, stop in parts[0][0].repeated:
            lane_L[start:stop] = lanes[number, 0][start:stop]
    grad_SP = parts[0][0].pending(lanes)
    assert grad_SP.shape == (min(shares, dp) * tp, parts[0][0].whole.num_params)
    again = lanes_of(parts, grad_SP, home % dp)
    assert again.keys() == lanes.keys()
    for lane, lane_L in lanes.items():
        assert np.array_equal(again[lane], lane_L), lane
    # Elsewhere, and from there on once more.
    dp, tp = second
    others = [parts_of(spec, tp, dp, index) for index in range(dp)]
    moved_SP = others[0][0].pending(lanes_of(others, grad_SP, home % dp))
    np.testing.assert_allclose(moved_SP.sum(0), grad_SP.sum(0), rtol=1e-5, atol=1e-5)


def test_the_rows_add_up_to_the_gradient():
    """Terms of whole factors are added over tp, split factors put side by side, repeated ones
    counted once."""
    parts = parts_of(SPECS[0], 2)
    whole = parts[0].num_whole
    lanes = {(0, i): random_P(parts[i].local.num_params, i) for i in range(2)}
    for start, stop in parts[0].repeated:
        lanes[0, 1][start:stop] = lanes[0, 0][start:stop]
    total_P = parts[0].pending(lanes).sum(0)
    for index, part in enumerate(parts):
        local_L = part.take(total_P)
        expected_L = lanes[0, index].copy()
        expected_L[:whole] = lanes[0, 0][:whole] + lanes[0, 1][:whole]
        for start, stop in part.repeated:
            expected_L[start:stop] = lanes[0, 0][start:stop]
        np.testing.assert_allclose(local_L, expected_L, rtol=1e-6)


def test_one_process_holds_the_vector_itself():
    (part,) = parts_of(SPECS[0], 1)
    vector_P = random_P(part.whole.num_params)
    assert part.take(vector_P) is vector_P
    assert part.local is part.whole
    assert part.own == slice(0, len(vector_P))


def test_an_axis_that_is_not_named_has_one_rank():
    place = Place({"tp": Coordinate(4, 1)})
    assert (place["tp"], place["dp"], place["ep"]) == ((4, 1), (1, 0), (1, 0))
    assert (place.moved("tp", 3)["tp"], place["tp"]) == ((4, 3), (4, 1))
