"""The engine runs in processes of its own: one for each device, started, watched and replaced.

Owns: messages between our processes, the group of processes behind one engine, what each of them
does with a command, and the watch over them.
Does not own: what a verb computes (engine), whose turn it is (scheduler), what is done again after
a group was lost (service, runs).
Talks to: hosting, engine and lora below; the api hosts a `RemoteEngine` as it does an `Engine` of
its own process. All but `member` and `launch`, which run in the engine's processes, is free of
torch, and all but `ray_launcher` and `ray_actor` of ray.
"""

from manylora.processes.group import EngineGroup, start_group
from manylora.processes.peer_addresses import address_toward
from manylora.processes.ray_client import RayClient
from manylora.processes.remote_engine import RemoteEngine

__all__ = ["EngineGroup", "RayClient", "RemoteEngine", "address_toward", "start_group"]
