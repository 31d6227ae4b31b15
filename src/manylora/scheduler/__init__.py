"""The queue: each adapter's operations in order, different adapters' operations merged.

Owns: per-adapter FIFOs, which operations run next (fairly, and never waiting for an absent
tenant), and the thread that runs them.
Does not own: tensors, the engine (it is handed one), clients.
Talks to: types only; the api composes it with an engine. No torch.
"""

from manylora.scheduler.queue import Call, Operation, OperationQueue, Pending
from manylora.scheduler.residency import Residency
from manylora.scheduler.worker import Runner, Worker

__all__ = ["Call", "Operation", "OperationQueue", "Pending", "Residency", "Runner", "Worker"]
