"""A small adapter and its training state, for the tests of this room."""

from dataclasses import replace
from typing import Any

import numpy as np

from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState
from manylora.types import AdapterSpec

SITES = [
    site
    for layer in range(2)
    for site in (
        Site(f"model.layers.{layer}.self_attn.q_proj", 8, 6, 4 * layer),
        Site(f"model.layers.{layer}.self_attn.v_proj", 8, 4, 4 * layer),
        Site(f"model.layers.{layer}.self_attn.o_proj", 6, 8, 4 * layer + 1),
        Site(f"model.layers.{layer}.mlp.up_proj", 8, 10, 4 * layer + 2),
    )
] + [Site("lm_head", 8, 20, 99, is_head=True)]


def spec_of(**changes: Any) -> AdapterSpec:
    """Settings that differ from every default, and the wanted changes."""
    plain = AdapterSpec(rank=3, alpha=7.5, targets=("q_proj", "up_proj"), seed=5)
    return replace(plain, **changes)


def state_of(
    spec: AdapterSpec | None = None, *, step: int = 4, seed: int = 0, shares: int = 1
) -> AdapterState:
    """A state in mid-training; every vector is random, so that a mix-up shows."""
    spec = spec or spec_of()
    layout = plan_layout(spec, resolve_targets(spec, SITES))
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(3 + shares, layout.num_params)).astype(np.float32)
    return AdapterState(spec, layout, rows[0], rows[1], rows[2] ** 2, rows[3:], step, draws=11)
