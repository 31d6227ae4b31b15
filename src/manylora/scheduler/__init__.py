"""The queue: each adapter's operations in order, different adapters' operations merged.

Owns: per-adapter lanes, which operations run next (fairly, and never waiting for an absent
tenant), how training and sampling share the device, the thread that runs them, which adapters stay
in memory, and the journal of what was acknowledged.
Does not own: tensors, the engine (it is handed one), clients, what a journalled record means.
Talks to: types only; the api composes it with an engine. No torch.
"""

from manylora.scheduler.journal import Journal
from manylora.scheduler.journal_format import Record
from manylora.scheduler.journal_recovery import Damage, Recovery
from manylora.scheduler.queue import Call, Operation, OperationQueue, Pending
from manylora.scheduler.residency import Residency
from manylora.scheduler.worker import BatchReport, Runner, Worker

__all__ = [
    "BatchReport",
    "Call",
    "Damage",
    "Journal",
    "Operation",
    "OperationQueue",
    "Pending",
    "Record",
    "Recovery",
    "Residency",
    "Runner",
    "Worker",
]
