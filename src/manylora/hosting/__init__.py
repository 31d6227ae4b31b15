"""This room hosts engines: the queue before each, and the adapters that come and go.

Owns: the protocol of the engine's verbs, the `Host` (a queue, a worker and a `Pager` for each
engine), with which engine an adapter lives (`Placement`), which adapters are in an engine and
which on disk (`Pager`), snapshots, and adapters' state files.
Does not own: whose turn it is (scheduler), files' formats (checkpoint), tensors (engine), handles
for programs (api), clients on a network (service).
Talks to: scheduler and checkpoint below; api, runs and service use it. No torch.
"""

from manylora.hosting.host import Host
from manylora.hosting.pager import Pager

__all__ = ["Host", "Pager"]
