"""Where an engine's processes come from: this machine, a Ray cluster, or somebody else's start."""

from dataclasses import replace
from pathlib import Path

from manylora.processes.commands import Opening
from manylora.processes.group import EngineGroup, launch_here
from manylora.processes.over_ray import OverRay
from manylora.processes.routes import address_toward
from manylora.processes.started import Meeting


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
    """
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


def _wherever_it_runs(base: str) -> str:
    """A folder by its whole path: Ray's processes work in another one than this."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base
