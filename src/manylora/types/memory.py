"""This module computes what takes how much memory, and alone refuses what does not fit.

The plan of a run, paging, the Python API and the service take an adapter's bytes only from here.
"""

from manylora.types.adapter_spec import DType
from manylora.types.errors import DoesNotFit

WEIGHT_BYTES: dict[DType, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
# In fp32 whatever the dtype; fp32 weights are their own master copy.
GRADIENT_BYTES = MASTER_BYTES = MOMENT_BYTES = 4
# Bytes of one sampled token: an integer and a float in tuples, and what they are made of.
ANSWER_TOKEN_BYTES = 96


def bytes_per_parameter(dtype: DType, dp: int = 1) -> float:
    """Return an adapter's bytes per parameter once it has stepped: of weights, gradient, master
    copy and two moments. Each of `dp` ranks has its slice of the master copy and the moments."""
    weights = WEIGHT_BYTES[dtype]
    master = 0 if dtype == "fp32" else MASTER_BYTES
    return weights + GRADIENT_BYTES + (master + 2 * MOMENT_BYTES) / dp


def adapter_bytes(num_params: int, dtype: DType, dp: int = 1) -> int:
    """Return the bytes of an adapter that has stepped, by the parameters that the rank holds."""
    return int(num_params * bytes_per_parameter(dtype, dp))


def bytes_text(count: float) -> str:
    """Write a number of bytes for people to read."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{int(count)} B"


def admit(what: str, needed: int, free: int, fits: str) -> None:
    """Let something be allocated if there is room for it. Raises DoesNotFit: more bytes are needed
    than are free. `what` begins the message's sentence; `fits` says what would fit."""
    if needed > free:
        raise DoesNotFit(
            f"{what} needs {bytes_text(needed)} of memory and {bytes_text(max(0, free))} is free; "
            f"{fits}"
        )


def admit_adapter(name: str, rank: int, num_params: int, dtype: DType, free: int) -> None:
    """Let an adapter be made if it fits with its gradient and optimizer; most of its modules have
    this rank. Raises DoesNotFit."""
    needed = adapter_bytes(num_params, dtype)
    largest = int(rank * max(0, free) / max(1, needed))
    fits = f"a rank of at most {largest:,} would fit" if largest else "none would fit"
    admit(f"adapter {name!r} (rank {rank:,}, {num_params:,} parameters)", needed, free, fits)
