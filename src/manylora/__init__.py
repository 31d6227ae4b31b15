"""Train many LoRA adapters at once on one shared base model.

with manylora.Trainer("seedling") as trainer:
    adapter = trainer.create("reverse", rank=8)
    data = [manylora.causal_datum(tokens, weights)]
    adapter.forward_backward(data)
    adapter.optim_step(lr=1e-3).result()
    adapter.export("out/reverse").result()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.api import AdapterHandle, SnapshotHandle, Trainer
    from manylora.types import (
        AdamParams,
        AdapterSpec,
        Datum,
        ManyloraError,
        SamplingParams,
        Scoring,
        causal_datum,
    )

__version__ = "0.1.0"

__all__ = [
    "AdamParams",
    "AdapterHandle",
    "AdapterSpec",
    "Datum",
    "ManyloraError",
    "SamplingParams",
    "Scoring",
    "SnapshotHandle",
    "Trainer",
    "causal_datum",
]


_DOOR = ("AdapterHandle", "SnapshotHandle", "Trainer")


def __getattr__(name: str) -> Any:
    # The door needs torch, which takes seconds to import, and even the words of `types` need
    # numpy; the command line's help must wait for neither.
    if name not in __all__:
        raise AttributeError(f"module 'manylora' has no attribute {name!r}")
    value = getattr(import_module("manylora.api" if name in _DOOR else "manylora.types"), name)
    globals()[name] = value
    return value
