"""A control process over Ray, which a test may kill: opens an engine, says so, waits.

python -m tests.parallel.ray_control ADDRESS BASE
"""

import sys

from manylora.processes import EngineGroup, RayClient, address_toward
from manylora.types import Opening
from manylora.types.mesh_shape import MeshShape


def opening(base: str, dp: int = 2) -> Opening:
    """A tiny base on `dp` processes."""
    return Opening(
        base, token_budget=64, dtype="fp32", device="cpu", threads=1, mesh=MeshShape(dp=dp)
    )


def main(address: str, base: str) -> None:
    launcher = RayClient(address)
    group = EngineGroup(
        opening(base), step_seconds=60, start=launcher, host=address_toward(launcher.peer())
    )
    group.open()
    heavy = [name for name in ("torch", "transformers", "ray") if name in sys.modules]
    print("open, with", *heavy, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
