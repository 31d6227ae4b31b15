"""This process starts an engine's processes as Ray actors, and starts them again.

One actor for each device, in a placement group: Ray finds the devices, notices the end of an actor
or of a machine, and ends all actors when this process ends, which it does with its control process.

Run as `python -m manylora.processes.ray_launcher ADDRESS SECONDS`. It writes `{"peer": HOST}` once
it is connected, then reads an `Assignment`; if it ends before it is told to, it writes
`{"problem": TEXT, "config": BOOL}`.
"""

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from manylora.processes.commands import BY_RAY, Assignment
from manylora.processes.connection import Unreachable
from manylora.processes.ray_actor import ActorPlace, RankActor
from manylora.types import ConfigError, EngineLost, ManyloraError

REACH_SECONDS = 5.0
# A server that is there, but not Ray's, would keep Ray's client for minutes.
CONNECT_SECONDS = 60.0
# A group that is lost this often, each time so soon, is not started again.
MOST_SHORT_LIVES, SHORT_SECONDS = 16, 30.0
# How often a launcher that waits for a machine says so.
REMIND_SECONDS = 30.0
# How long the actors of a generation that is lost have for their end.
END_SECONDS = 30.0

_COLOURS = re.compile(r"\x1b\[\d*m")
_WHERE = re.compile(r"\bip[=:] ?([0-9a-fA-F.:]+)")

Say = Callable[[dict[str, Any]], None]


def main(address: str, place_seconds: float, say: Say) -> int:
    """Start the processes and watch them until they are told to stop; return the exit status."""
    try:
        say({"peer": connected(address, say)})
        line = sys.stdin.buffer.readline()
        if not line:
            return 0
        threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
        assignment = Assignment.parse(line)
        keep_up(assignment, placed(assignment, address, place_seconds))
    except ManyloraError as error:
        say(_problem(error))
        return 1
    return 0


def keep_up(assignment: Assignment, group: Any) -> None:
    """Start one generation after the other, until one is told to stop.

    Raises:
        ConfigError: the first could not reach the control process.
        EngineLost: none stays up.
    """
    generation, short = 0, 0
    while True:
        began = time.monotonic()
        try:
            run_generation(assignment, group, generation)
        except (ConfigError, EngineLost) as error:
            if isinstance(error, ConfigError) and generation == 0:
                raise
            short = short + 1 if time.monotonic() - began < SHORT_SECONDS else 0
            if short == MOST_SHORT_LIVES:
                raise EngineLost(f"the engine's actors go again and again: {error}") from error
            print(f"generation {generation} of the engine is lost: {error}", file=sys.stderr)
        else:
            return
        generation += 1


def run_generation(assignment: Assignment, group: Any, generation: int) -> None:
    """Start an actor for each device of a placement group; return when all were told to stop.

    Raises:
        EngineLost: one of them went; the others have been ended.
        ConfigError: one of them cannot work where it is.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    made: Any = ray.remote(RankActor)
    actors = [
        made.options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
        ).remote()
        for number, bundle in enumerate(group.bundle_specs)
    ]
    runs: list[Any] = []
    try:
        places = _places([actor.place.remote() for actor in actors], generation)
        order = ranks_of(places, assignment.tp)
        ordered = [actors[number] for number in order]
        spots = [places[number] for number in order]
        meeting = ray.get(ordered[0].meeting_place.remote(_peer_of(0, spots)))
        runs = [
            actor.run.remote(
                assignment.address,
                assignment.secret,
                environment_of(rank, spots, meeting, generation),
                _peer_of(rank, spots),
            )
            for rank, actor in enumerate(ordered)
        ]
        rest = list(runs)
        while rest:
            done, rest = ray.wait(rest)
            ray.get(done)
    except Unreachable as error:
        raise ConfigError(_cause(error)) from error
    except RayError as error:
        raise EngineLost(_cause(error)) from error
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.wait(runs, num_returns=len(runs), timeout=END_SECONDS) if runs else None


def _places(asked: list[Any], generation: int) -> list[ActorPlace]:
    """Return where the actors are, once all are somewhere: a lost machine may take long to return.
    If one cannot begin, the first generation raises ConfigError, a later one RayError."""
    import ray
    from ray.exceptions import RayError

    while True:
        there, missing = ray.wait(asked, num_returns=len(asked), timeout=REMIND_SECONDS)
        try:
            found: list[ActorPlace] = ray.get(there)
        except RayError as error:
            if generation == 0:
                raise ConfigError(
                    f"ray: a process of the engine cannot begin: {_cause(error)}; every machine of "
                    "the cluster needs the same version of manylora and its own environment for it"
                ) from error
            raise
        if not missing:
            return found
        print(f"the engine waits for {len(missing)} devices of the Ray cluster", file=sys.stderr)


def ranks_of(places: Sequence[ActorPlace], tp: int) -> list[int]:
    """Return which place has which world rank: `tp` neighbours are on one machine if that can be.

    World rank = dp · tp + tp's own, so each run of `tp` ranks exchanges the most.
    """
    machines: dict[str, list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        machines[place.node].append(number)
    whole: list[int] = []
    rest: list[int] = []
    for numbers in machines.values():
        cut = len(numbers) - len(numbers) % tp
        whole += numbers[:cut]
        rest += numbers[cut:]
    return whole + rest


def environment_of(
    rank: int, places: Sequence[ActorPlace], meeting: tuple[str, int], generation: int
) -> dict[str, str]:
    """Return what torch's launcher would set for this rank. `places` are by rank.

    The processes of a machine see all devices that are theirs, in one order, and take the one with
    the number LOCAL_RANK: that lets NCCL copy directly between them.
    """
    here = places[rank].node
    neighbours = [other for other, place in enumerate(places) if place.node == here]
    found = {
        "RANK": rank,
        "WORLD_SIZE": len(places),
        "LOCAL_RANK": neighbours.index(rank),
        "LOCAL_WORLD_SIZE": len(neighbours),
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": meeting[1],
        "TORCHELASTIC_RESTART_COUNT": generation,
        BY_RAY: 1,
    }
    gpus = [gpu for other in neighbours for gpu in places[other].gpus]
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return {name: str(value) for name, value in found.items()}


def _peer_of(rank: int, places: Sequence[ActorPlace]) -> str:
    """Return the address of another machine; of rank 0's where it is another."""
    others = (place.address for place in places if place.node != places[rank].node)
    return next(others, places[rank].address)


def connected(address: str, say: Say) -> str:
    """Join the cluster; return the address of another of its machines."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"ray is not installed ({error}); pip install 'manylora[ray]'") from error
    if address != "auto":
        _reach(address)
    patience = threading.Timer(CONNECT_SECONDS, _give_up, (address, say))
    patience.daemon = True
    patience.start()
    try:
        ray.init(address=address, logging_level=logging.ERROR)
    except Exception as error:
        raise ConfigError(
            f"the Ray cluster {address!r} cannot be joined from {socket.gethostname()}: {error}; "
            "this machine must be one of its nodes (ray start --address=HEAD:PORT, with "
            "--num-cpus=0 --num-gpus=0 if it is to lend no device)"
        ) from error
    patience.cancel()
    here = ray.util.get_node_ip_address()
    known = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    return next((one for one in known if one != here), here)


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"ray: {address!r} is neither `auto` nor HOST:PORT of a cluster's head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"ray: nobody answers at {address} ({error}); give the address that `ray start --head` "
            "printed"
        ) from error


def _give_up(address: str, say: Say) -> None:
    say(_problem(ConfigError(f"ray: what answers at {address} is not the head of a Ray cluster")))
    os._exit(1)


def placed(assignment: Assignment, address: str, seconds: float) -> Any:
    """Return a placement group with a device for each process, on as few machines as possible."""
    import ray
    from ray.util.placement_group import placement_group

    gpus = assignment.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    kind = "GPU" if gpus else "CPU"
    group = placement_group([{kind: 1}] * assignment.num_processes, strategy="PACK")
    if not group.wait(seconds):
        total, free = ray.cluster_resources(), ray.available_resources()
        raise ConfigError(
            f"ray: of the {total.get(kind, 0):g} {kind}s of the cluster {address!r} "
            f"{free.get(kind, 0):g} are free, and {assignment.num_processes} are needed, one for "
            "each process of the mesh"
        )
    return group


def _cause(error: BaseException) -> str:
    """Return what Ray's error is about, and where: the last line of what it says."""
    text = _COLOURS.sub("", str(getattr(error, "cause", None) or error)).strip()
    where = _WHERE.search(text)
    last = text.splitlines()[-1].strip() if text else type(error).__name__
    return last + (f" (on {where[1]})" if where else "")


def _problem(error: ManyloraError) -> dict[str, Any]:
    return {"problem": str(error), "config": isinstance(error, ConfigError)}


def _end_with(control: int) -> None:
    while os.read(control, 1):
        pass
    os._exit(0)


def _speaker() -> Say:
    """Return what writes to the control process; all other output goes where errors go."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(word: dict[str, Any]) -> None:
        output.write(json.dumps(word) + "\n")
        output.flush()

    return say


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), _speaker()))
