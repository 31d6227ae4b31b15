"""The queue: each adapter's operations in order, different adapters' operations merged.

Owns: per-adapter lanes, which operations run next (fairly, and never waiting for an absent
tenant), how training and sampling share the device, and the thread that runs them.
Does not own: tensors, the engine (it is handed one), clients.
Talks to: types only; the api composes it with an engine. No torch.
"""

from manylora.scheduler.queue import Call, Operation, OperationQueue, Pending
from manylora.scheduler.worker import BatchReport, Runner, Worker

__all__ = ["BatchReport", "Call", "Operation", "OperationQueue", "Pending", "Runner", "Worker"]
