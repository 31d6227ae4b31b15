"""What things take of memory, and the one refusal of what does not fit.

The bytes of an adapter come from here and nowhere else; the plan of a run, paging and the doors
ask.
"""

from manylora.types.adapter_spec import DType
from manylora.types.errors import DoesNotFit

WEIGHT_BYTES: dict[DType, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
# In fp32 whatever the dtype; fp32 weights are their own master copy.
GRADIENT_BYTES = MASTER_BYTES = MOMENT_BYTES = 4
# Of one sampled token: an integer and a float in tuples, and what they are made of.
ANSWER_TOKEN_BYTES = 96


def bytes_per_parameter(dtype: DType, dp: int = 1) -> float:
    """Of an adapter that has stepped: weights, gradient, master copy and two moments.

    Args:
        dp: data-parallel ranks, each with its slice of the master copy and the moments.
    """
    weights = WEIGHT_BYTES[dtype]
    master = 0 if dtype == "fp32" else MASTER_BYTES
    return weights + GRADIENT_BYTES + (master + 2 * MOMENT_BYTES) / dp


def adapter_bytes(num_params: int, dtype: DType, dp: int = 1) -> int:
    """Of an adapter of so many parameters (those that the rank holds) once it has stepped."""
    return int(num_params * bytes_per_parameter(dtype, dp))


def bytes_text(count: float) -> str:
    """Bytes for people."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{int(count)} B"


def admit(what: str, needed: int, free: int, fits: str) -> None:
    """Let something be allocated, if there is room for it.

    Args:
        what: that needs so many bytes; the beginning of a sentence.
        fits: what would fit.

    Raises:
        DoesNotFit
    """
    if needed > free:
        raise DoesNotFit(
            f"{what} needs {bytes_text(needed)} of memory and {bytes_text(max(0, free))} is free; "
            f"{fits}"
        )


def admit_adapter(name: str, rank: int, num_params: int, dtype: DType, free: int) -> None:
    """Let an adapter be made, if it fits with gradient and optimizer.

    Args:
        rank: of most of its modules.

    Raises:
        DoesNotFit
    """
    needed = adapter_bytes(num_params, dtype)
    largest = int(rank * max(0, free) / max(1, needed))
    fits = f"a rank of at most {largest:,} would fit" if largest else "none would fit"
    admit(f"adapter {name!r} (rank {rank:,}, {num_params:,} parameters)", needed, free, fits)
