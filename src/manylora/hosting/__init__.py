"""What hosts an engine: the queue before it, and the adapters that come and go.

Owns: the protocol of the engine's verbs, a `Host` (one engine, one queue, one worker) and
`Replicas` of it, which adapters are in the engine and which on disk (`Pager`), snapshots, and
adapters' state files.
Does not own: whose turn it is (scheduler), files' formats (checkpoint), tensors (engine), handles
for programs (api), clients on a network (service).
Talks to: scheduler and checkpoint below; api, runs and service use it. No torch.
"""

from manylora.hosting.host import Host
from manylora.hosting.pager import Pager
from manylora.hosting.replicas import AnyHost, host_of

__all__ = ["AnyHost", "Host", "Pager", "host_of"]
