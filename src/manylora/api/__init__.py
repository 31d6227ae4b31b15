"""The Python API opens a base, and creates, trains, samples, saves and exports adapters.

Owns: `Trainer`, the adapters of one owner on a host (`AdapterClient`), and the handles on them.
Does not own: the host (hosting), training recipes (runs), files' formats (checkpoint), tensors
(engine).
Talks to: hosting, processes, engine and checkpoint below; programs, runs, service and the command
line use it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manylora.api.client import AdapterClient, AdapterHandle, SnapshotHandle

if TYPE_CHECKING:
    from manylora.api.trainer import Trainer

__all__ = ["AdapterClient", "AdapterHandle", "SnapshotHandle", "Trainer"]


def __getattr__(name: str) -> Any:
    # Its engine lives in this process and needs torch, which a server's own process does without.
    if name != "Trainer":
        raise AttributeError(f"module 'manylora.api' has no attribute {name!r}")
    return import_module("manylora.api.trainer").Trainer
