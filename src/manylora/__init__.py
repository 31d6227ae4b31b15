"""Train many LoRA adapters at once on one shared base model.

    with manylora.Trainer("seedling") as trainer:
        adapter = trainer.create("reverse", rank=8)
        data = [manylora.causal_datum(tokens, weights)]
        adapter.forward_backward(data)
        adapter.optim_step(lr=1e-3).result()
        adapter.export("out/reverse").result()
"""

from typing import TYPE_CHECKING, Any

from manylora.types import (
    AdamParams,
    AdapterSpec,
    Datum,
    ManyloraError,
    SamplingParams,
    causal_datum,
)

if TYPE_CHECKING:
    from manylora.api import AdapterHandle, SnapshotHandle, Trainer

__version__ = "0.1.0"

__all__ = [
    "AdamParams",
    "AdapterHandle",
    "AdapterSpec",
    "Datum",
    "ManyloraError",
    "SamplingParams",
    "SnapshotHandle",
    "Trainer",
    "causal_datum",
]


def __getattr__(name: str) -> Any:
    # The door needs torch, which takes seconds to import; the command line's help must not.
    if name in ("AdapterHandle", "SnapshotHandle", "Trainer"):
        from manylora import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module 'manylora' has no attribute {name!r}")
