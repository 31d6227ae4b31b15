"""Law 1 on a mesh: training together gives each adapter the bits that it gets alone there.

Neither the neighbours nor the rank where its first share runs shows in an adapter's bits.

Faults that were planted and seen to fail here: gradients added up in the order of the ranks instead
of the shares, dropout drawn by rank.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from manylora.engine import Engine, plan
from manylora.engine.plan import Piece, choose_homes
from manylora.parallel import Mesh
from manylora.types import Opening
from tests.parallel.processes import run_ranks
from tests.parallel.training import assert_same_numbers, crowd, train

ROUNDS = 7
FOUR = {"num_key_value_heads": 4}
SHAPES = ["dp=2", "dp=4", "dp=2,tp=2"]
SLOW = [pytest.param(shape, marks=pytest.mark.slow) for shape in ("tp=2", "tp=4")]


def trained(mesh: Mesh, folder: str, names: list[str] | None, seed: int | None) -> Any:
    """What came of it for some tenants, alone or together, with homes drawn at random if asked."""
    engine = Engine(Opening(str(folder), token_budget=64, device="cpu"), mesh)
    found = {}
    homes: dict[plan.Whose, set[int]] = {}

    def anywhere(
        pieces: Iterable[Piece], ranks: int, kept: Mapping[str, int | None]
    ) -> dict[plan.Whose, int]:
        chosen = choose_homes(pieces, ranks, kept)
        for name in chosen:
            if rng is not None and kept.get(str(name)) is None:
                chosen[name] = int(rng.integers(ranks))
            homes.setdefault(name, set()).add(chosen[name])
        return chosen

    tenants = crowd(exact=True)
    groups = [tenants] if names is None else [[t for t in tenants if t.name == n] for n in names]
    rng = None if seed is None else np.random.default_rng(seed)
    with patch.object(plan, "choose_homes", anywhere):
        for group in groups:
            found |= train(mesh, engine, group, range(ROUNDS))
            for tenant in group:
                engine.unload(tenant.name)
    seen = {name: sorted(own) for name, own in homes.items()}
    return {"found": found, "homes": seen} if mesh.is_leader else None


@pytest.mark.parametrize("shape", [*SHAPES, *SLOW])
def test_together_as_alone_wherever_the_home_is(tiny, shape: str):
    folder: Path = tiny("llama", **FOUR)
    together = run_ranks(trained, shape, str(folder), None, None)[0]
    names = [tenant.name for tenant in crowd(exact=True)]
    alone = run_ranks(trained, shape, str(folder), names, None)[0]
    moved = run_ranks(trained, shape, str(folder), None, 1)[0]
    assert_same_numbers(together["found"], alone["found"])
    assert_same_numbers(together["found"], moved["found"])
    if shape.startswith("dp"):
        # Homes did differ, and alone everyone is at home on the first rank.
        assert max(map(len, moved["homes"].values())) > 1
        assert any(own != [0] for own in together["homes"].values())
        assert all(own == [0] for own in alone["homes"].values())
