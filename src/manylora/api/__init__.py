"""The Python door: open a base, create adapters, train, sample, save, export.

Owns: `Trainer` and the adapter handles, and the composition of one engine with one queue (`Host`),
which the server shares between its tenants.
Does not own: training recipes (runs), files' formats (checkpoint), tensors (engine).
Talks to: scheduler, engine and checkpoint below; programs, runs and the command line use it.
"""

from manylora.api.door import AdapterDoor
from manylora.api.handle import AdapterHandle, SnapshotHandle
from manylora.api.host import Host
from manylora.api.trainer import Trainer

__all__ = ["AdapterDoor", "AdapterHandle", "Host", "SnapshotHandle", "Trainer"]
