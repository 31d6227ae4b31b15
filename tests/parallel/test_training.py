"""Law 3: the mesh does not matter. Every mesh gives what one process gives.

Gradients agree within 1e-5 of their norm (fp32 sums in another order); weights within 1e-4 after
20 steps. Replicas are compared to the bit after every call.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.parallel import Mesh
from tests.parallel.processes import run_ranks
from tests.parallel.training import VECTORS, crowd, train

ROUNDS = 20
GRADIENT, WEIGHTS, LOGPROBS = 1e-5, 1e-4, 1e-4
# Four key-value heads, so that four ranks can share them.
FOUR = {"num_key_value_heads": 4}


def trained(mesh: Mesh, folder: str, rounds: int) -> Any:
    engine = Engine(folder, token_budget=64, device="cpu", mesh=mesh)
    found = train(mesh, engine, crowd(), range(rounds))
    # Every rank knows all, which the replicas' test compares; one copy is enough.
    return found if mesh.is_leader else None


@lru_cache
def alone(folder: Path) -> Any:
    return run_ranks(trained, "dp=1", str(folder), ROUNDS)[0]


@pytest.mark.parametrize("shape", ["dp=2", "dp=4"])
@pytest.mark.parametrize("family", ["llama"])
def test_a_mesh_trains_as_one_process(tiny, family: str, shape: str):
    folder = tiny(family, **FOUR)
    found = run_ranks(trained, shape, str(folder), ROUNDS)[0]
    assert_agrees(found, alone(folder))


def assert_agrees(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, own in expected.items():
        its = found[name]
        for a, b in zip(its["logprobs"], own["logprobs"], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=LOGPROBS, err_msg=name)
        np.testing.assert_allclose(its["losses"], own["losses"], rtol=1e-4, atol=1e-3)
        for number, (a, b) in enumerate(zip(its["gradients"], own["gradients"], strict=True)):
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            # Later gradients are taken at weights that differ a little.
            assert error < GRADIENT * (1 if number < 2 else 100), f"{name}, step {number}: {error}"
        np.testing.assert_allclose(its["norms"], own["norms"], rtol=1e-3)
        np.testing.assert_allclose(its["norms"][:2], own["norms"][:2], rtol=1e-5)
        end, expected_end = its["end"], own["end"]
        for counter in ("step", "draws", "poison"):
            assert end[counter] == expected_end[counter], name
        assert end["step"] >= (1 if name == "idle" else ROUNDS // 4)
        for vector in VECTORS[:3]:
            np.testing.assert_allclose(
                end[vector], expected_end[vector], rtol=0, atol=WEIGHTS, err_msg=f"{name} {vector}"
            )
