"""The base's own weights can be read on any mesh."""

from typing import Any

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.parallel import Mesh
from manylora.types import Opening
from tests.parallel.processes import run_ranks


def weights(mesh: Mesh, folder: str) -> Any:
    engine = Engine(Opening(str(folder), device="cpu"), mesh)
    found = {site.name: engine.base_weight(site.name) for site in engine.sites}
    for site in engine.sites:
        assert found[site.name].shape == (site.out_features, site.in_features)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", ["dp=2", "tp=2", "dp=4", "tp=4", "dp=2,tp=2"])
def test_a_weight_is_put_together_from_its_parts(tiny, shape: str, tied: bool):
    """Also of a vocabulary that ranks cannot share equally."""
    folder = tiny("qwen3", num_key_value_heads=4, vocab_size=157, tie_word_embeddings=tied)
    (alone,) = run_ranks(weights, "dp=1", str(folder))
    for rank in run_ranks(weights, shape, str(folder)):
        assert rank.keys() == alone.keys()
        for name, weight_NK in alone.items():
            assert np.array_equal(rank[name], weight_NK), name
