"""Train many LoRA adapters at once on one shared base model.

with manylora.Trainer("seedling") as trainer:
    adapter = trainer.create("reverse", rank=8)
    data = [manylora.causal_datum(tokens, weights)]
    adapter.forward_backward(data)
    adapter.optim_step(lr=1e-3).result()
    adapter.export("out/reverse").result()
"""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.api import AdapterHandle, SnapshotHandle, Trainer
    from manylora.runs.rl.user_types import RolloutResult, group_reward
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
    "RolloutResult",
    "SamplingParams",
    "Scoring",
    "SnapshotHandle",
    "Trainer",
    "causal_datum",
    "group_reward",
]


def _ask_for_rows_that_keep_their_bits() -> None:
    """Have Intel's library add up a product's row in one order, whatever the number of rows.

    It reads the variable with the first thing that it computes in a process, so this is done before
    anybody asks for torch. On other CPUs the library has no such mode. See
    docs/decisions/0002-pieces-and-bits.md.
    """
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            intel = b"GenuineIntel" in file.read(1024)
    except OSError:
        return
    if intel:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


_ask_for_rows_that_keep_their_bits()

# Where a name comes from that is not of `types`.
_MODULES = {
    **dict.fromkeys(("AdapterHandle", "SnapshotHandle", "Trainer"), "manylora.api"),
    **dict.fromkeys(("RolloutResult", "group_reward"), "manylora.runs.rl.user_types"),
}


def __getattr__(name: str) -> Any:
    # The Python API needs torch, which takes seconds to import, and even the words of `types` need
    # numpy; the command line's help must wait for neither.
    if name not in __all__:
        raise AttributeError(f"module 'manylora' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "manylora.types")), name)
    globals()[name] = value
    return value
