"""Where an engine's processes come from: this machine, a Ray cluster, or somebody else's start."""

import json
from dataclasses import replace
from pathlib import Path

from manylora.processes.external_start import Meeting
from manylora.processes.group import EngineGroup, launch_here
from manylora.processes.peer_addresses import address_toward
from manylora.processes.ray_client import OverRay
from manylora.types import Opening
from manylora.types.mesh_shape import MeshShape

# The base that comes with the package.
SEEDLING = "seedling"


def start_group(
    opening: Opening,
    *,
    step_seconds: float,
    ray: str | None = None,
    engine_address: str | None = None,
    meeting: Meeting | None = None,
) -> EngineGroup:
    """Start the processes of an engine.

    Args:
        opening: what they are to open.
        step_seconds: a command that takes longer is taken for hung.
        ray: the address of the cluster whose devices they are to use: `auto` or HOST:PORT; None =
            this machine's.
        engine_address: with Ray, the address of this machine at which they can reach it; None = the
            one on the route toward them.
        meeting: where they meet if they were started already.

    Raises:
        ConfigError: there is no such cluster, or `engine_address` is not one of this machine.
        Unsupported: the base's config says that this mesh cannot split it.
    """
    check_split(opening.base, opening.mesh)
    if meeting is not None:
        return EngineGroup(opening, step_seconds=step_seconds, start=meeting, host=meeting.host)
    if ray is None:
        return EngineGroup(opening, step_seconds=step_seconds, start=launch_here)
    launcher = OverRay(ray)
    try:
        host = address_toward(launcher.peer())
        return EngineGroup(
            replace(opening, base=_wherever_it_runs(opening.base)),
            step_seconds=step_seconds,
            start=launcher,
            host=engine_address or host,
        )
    except BaseException:
        launcher.kill()
        raise


def check_split(base: str, mesh: MeshShape) -> None:
    """Refuse a `tp` that a base's config.json rules out, before a process is started or a weight
    read. A base that is not on this machine, or has no such file, is left to those who open it.

    Raises:
        Unsupported
    """
    folder = Path(__file__).parents[1] / "models" / base if base == SEEDLING else Path(base)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config")
    except (OSError, ValueError, AttributeError):
        return
    mesh.check_split({**config, **text} if isinstance(text, dict) else config, repr(base))


def _wherever_it_runs(base: str) -> str:
    """A folder by its whole path: Ray's processes work in another one than this."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base
