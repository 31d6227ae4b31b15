"""The queue keeps each adapter's operations in order, and merges different adapters'.

Owns: per-adapter lanes, which operations run next (fairly, and never waiting for an absent
tenant), how training and sampling share the device, the thread that runs them, and which of many
things stay in memory.
Does not own: tensors, the engine (it is handed one), clients.
Talks to: types only; hosting composes it with an engine. No torch.
"""

from manylora.scheduler.queue import Call, Operation, OperationQueue, Pending
from manylora.scheduler.residency import Residency
from manylora.scheduler.worker import BatchReport, Runner, Worker

__all__ = [
    "BatchReport",
    "Call",
    "Operation",
    "OperationQueue",
    "Pending",
    "Residency",
    "Runner",
    "Worker",
]
