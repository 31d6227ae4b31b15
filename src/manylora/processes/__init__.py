"""The engine in processes of its own: one for each device, started, watched and replaced.

Owns: messages between our processes, the group of processes behind one engine, what each of them
does with a command, and the watch over them.
Does not own: what a verb computes (engine), whose turn it is (scheduler), what is lost with a group
and done again (service, runs).
Talks to: engine and lora below; the api puts a `RemoteEngine` where a program of its own has an
`Engine`. All but `member` and `launch`, which run in those processes, is free of torch, and all but
`ray_launcher` and `ray_actor` of ray.
"""

from manylora.processes.group import EngineGroup, start_group
from manylora.processes.peer_addresses import address_toward
from manylora.processes.ray_client import OverRay
from manylora.processes.remote_engine import RemoteEngine

__all__ = [
    "EngineGroup",
    "OverRay",
    "RemoteEngine",
    "address_toward",
    "start_group",
]
