"""The database knows who may come in, and what exists that must outlive the process.

Owns: tables, their migrations, and the queries on keys, sessions, models, samplers, checkpoints and
runs. A query takes the tenant on whose behalf it is made: another tenant's row is a missing row.
Does not own: tensors, results and operations (they are files, never rows), the files that a
checkpoint's row names, what a state means.
Talks to: types only. Synchronous and thread-safe; each method is one short transaction, made for a
worker thread. No torch.
"""

from manylora.store.database import DATABASE
from manylora.store.records import (
    CheckpointRow,
    KeyRow,
    ModelRow,
    Page,
    RunRow,
    SamplerRow,
    SessionRow,
)
from manylora.store.store import Store

__all__ = [
    "DATABASE",
    "CheckpointRow",
    "KeyRow",
    "ModelRow",
    "Page",
    "RunRow",
    "SamplerRow",
    "SessionRow",
    "Store",
]
