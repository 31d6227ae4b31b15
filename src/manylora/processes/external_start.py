"""Torchrun or SLURM has started the processes: the first controls, and all of them compute.

They meet through a file in a folder that all of them see, which only their user can read: it holds
the address of the first and the group's secret. Their starter watches them, and restarts them.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from manylora.processes.commands import Assignment
from manylora.processes.connection import Connection
from manylora.processes.peer_addresses import address_toward
from manylora.types import ConfigError
from manylora.types.files import write_whole
from manylora.types.mesh_shape import MeshShape

# How long the first process may take to write the file, and the others' file system to show it.
MEETING_SECONDS = 120.0
LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Started:
    """A `Started` is this process's place among those that were started together.

    Attributes:
        world_rank: which process this is.
        world_size: of how many.
        run: distinguishes them from others that were started with the same folder.
    """

    world_rank: int
    world_size: int
    run: str

    def check(self, shape: MeshShape) -> None:
        """Raise ConfigError if the mesh is of another size."""
        if shape.size != self.world_size:
            raise ConfigError(
                f"{self.world_size} processes were started, and mesh {shape} has {shape.size}; "
                f"give a mesh of as many, such as --mesh dp={self.world_size}"
            )

    def serve(self, folder: Path) -> None:
        """Be one of the engine's processes until the first one ends. Raises ConfigError: the first
        one's file does not show in `folder`, or it cannot be reached."""
        from manylora.processes import member

        member.serve(self._connected(self.meeting(folder)))

    def _connected(self, meeting: Path) -> Connection:
        until = time.monotonic() + MEETING_SECONDS
        problem: Exception | None = None
        while time.monotonic() < until:
            try:
                told = json.loads(meeting.read_text(encoding="utf-8"))
                secret = bytes.fromhex(told["secret"])
                return Connection.made(told["address"], secret, MEETING_SECONDS)
            except (OSError, EOFError, ValueError, KeyError) as error:
                # Not there yet, or left by an earlier run, perhaps torn.
                problem = error
                time.sleep(LOOK_SECONDS)
        raise ConfigError(
            f"process {self.world_rank} on {socket.gethostname()} cannot find the first one by "
            f"{meeting} ({problem}); `out` must be a folder that all machines share, and the "
            "first process must be within reach"
        )

    def host(self) -> str:
        """Return the first process's address on the route toward the others."""
        return address_toward(os.environ.get("MASTER_ADDR", "127.0.0.1"))

    def meeting(self, folder: Path) -> Path:
        """Return the file that tells where the first process is."""
        return folder / f".meeting-{self.run}.json"


class Meeting:
    """`EngineGroup` starts a meeting where the processes are there already; see `Launcher`."""

    def __init__(self, started: Started, folder: Path):
        """Meet in `folder`, which all processes see."""
        self.host = started.host()
        self._path = started.meeting(folder)

    def __call__(self, assignment: Assignment) -> "Meeting":
        """Tell the others where to come, and be one of them."""
        from manylora.processes import member

        told = {"address": assignment.address, "secret": assignment.secret}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(told).encode())

        def be_one() -> None:
            secret = bytes.fromhex(assignment.secret)
            connection = Connection.made(assignment.address, secret, MEETING_SECONDS)
            # The control process is this very one, and has still to say what went wrong.
            with suppress(OSError):
                member.serve(connection, gone=lambda: None)

        threading.Thread(target=be_one, daemon=True).start()
        return self

    def poll(self) -> int | None:
        """The processes do not end before this one does."""
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The other processes end by themselves; nothing is waited for."""
        self._path.unlink(missing_ok=True)
        return 0

    def kill(self) -> None:
        """The other processes notice that their connection is gone."""


def started_by_others() -> Started | None:
    """Return this process's place, if torchrun or SLURM has started several.

    torchrun tells it by RANK, WORLD_SIZE and TORCHELASTIC_RUN_ID. With `srun`, SLURM_PROCID and
    SLURM_NTASKS tell it; MASTER_ADDR and MASTER_PORT must be given, or ConfigError is raised.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
        restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        run = f"{environment['TORCHELASTIC_RUN_ID']}-{restart}"
        return Started(int(environment["RANK"]), int(environment["WORLD_SIZE"]), run)
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise ConfigError(
                    f"SLURM has started {environment['SLURM_NTASKS']} processes and {name} is not "
                    "set; export MASTER_ADDR (the first node) and MASTER_PORT (any free port there)"
                )
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
        run = f"{environment['SLURM_JOB_ID']}-{environment['SLURM_STEP_ID']}"
        return Started(int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), run)
    return None
