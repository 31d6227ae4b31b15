"""The Python door: open a base, create adapters, train, sample, save, export.

Owns: `Trainer` and the adapter handles, and the composition of one engine with one queue (`Host`),
or of several (`Hosts`), which the server shares between its tenants.
Does not own: training recipes (runs), files' formats (checkpoint), tensors (engine).
Talks to: processes, scheduler, engine and checkpoint below; programs, runs, service and the command
line use it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manylora.api.door import AdapterDoor
from manylora.api.handle import AdapterHandle, SnapshotHandle
from manylora.api.host import Host
from manylora.api.hosts import AnyHost, host_of
from manylora.api.paging import Pager

if TYPE_CHECKING:
    from manylora.api.trainer import Trainer

__all__ = [
    "AdapterDoor",
    "AdapterHandle",
    "AnyHost",
    "Host",
    "Pager",
    "SnapshotHandle",
    "Trainer",
    "host_of",
]


def __getattr__(name: str) -> Any:
    # Its engine lives in this process and needs torch, which a server's own process does without.
    if name != "Trainer":
        raise AttributeError(f"module 'manylora.api' has no attribute {name!r}")
    return import_module("manylora.api.trainer").Trainer
