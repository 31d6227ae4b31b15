"""Numbers in safetensors files without torch: fp32 in memory, fp32, bf16 or fp16 on disk.

numpy has no bf16. Its numbers are the upper halves of fp32 numbers, and are kept as uint16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, TensorSpec, deserialize, safe_open, serialize_file

from manylora.lora.state import Floats
from manylora.types import CheckpointDamaged, CheckpointMismatch
from manylora.types.adapter import DType

Encoded: TypeAlias = npt.NDArray[Any]

# dtype → its names when safetensors writes and when it reads, and its numbers in memory.
_FORMATS: dict[DType, tuple[str, str, npt.DTypeLike]] = {
    "fp32": ("float32", "F32", np.float32),
    "bf16": ("bfloat16", "BF16", np.uint16),
    "fp16": ("float16", "F16", np.float16),
}
DTYPES = tuple(_FORMATS)
_BF16_NAN = 0x7FC0


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor as its file has it.

    Attributes:
        dtype: as safetensors calls it (`F32`, `I64`, …).
        data: its bytes, row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytearray

    @property
    def known(self) -> DType | None:
        """Its dtype by our name; None if it is none of ours."""
        return next((name for name, (_, read, _) in _FORMATS.items() if read == self.dtype), None)

    def fp32(self) -> Floats:
        """Its numbers, exactly. Its dtype must be one of ours."""
        dtype = self.known
        assert dtype is not None
        return decoded(np.frombuffer(self.data, _FORMATS[dtype][2]), dtype).reshape(self.shape)


def encoded(values: Floats, dtype: DType) -> Encoded:
    """A copy of `values` in `dtype`, rounded to nearest, ties to even; bf16 as its bits."""
    if dtype == "fp32":
        return values.astype(np.float32)
    if dtype == "fp16":
        with np.errstate(all="ignore"):  # too large a number becomes infinite
            return values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32)
    # Half of the last place that stays, less one bit unless that place is odd. It may carry into
    # the exponent, which is right: up to infinity.
    rounded_bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), _BF16_NAN, rounded_bits).astype(np.uint16)


def decoded(numbers: Encoded, dtype: DType) -> Floats:
    """A copy in fp32 of what `encoded` gave."""
    if dtype == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def rounded(values: Floats, dtype: DType) -> Floats:
    """`values` as they are after a passage through `dtype`."""
    return decoded(encoded(values, dtype), dtype)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Encoded],
    dtype: DType,
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write arrays that `encoded` gave, of any shape and strides.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    name, _, in_memory = _FORMATS[dtype]
    packed = {key: np.ascontiguousarray(value, in_memory) for key, value in tensors.items()}
    # The specs hold addresses: `packed` must outlive the call.
    specs = {
        key: TensorSpec(
            dtype=name, shape=value.shape, data_ptr=value.ctypes.data, data_len=value.nbytes
        )
        for key, value in packed.items()
    }
    serialize_file(specs, path, metadata=metadata)


def read_fp32(path: Path) -> dict[str, Floats]:
    """Every tensor of a file that holds nothing but fp32, in memory of its own.

    Raises:
        CheckpointDamaged: it is missing, or no safetensors file.
        CheckpointMismatch: a tensor is of another dtype.
    """
    tensors: dict[str, Floats] = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                dtype = file.get_slice(key).get_dtype()
                if dtype != _FORMATS["fp32"][1]:
                    raise CheckpointMismatch(f"{path}: {key} is {dtype}; only F32 belongs there")
                # What the library gives may be the file itself, mapped into memory.
                tensors[key] = file.get_tensor(key).copy()
    except (OSError, SafetensorError) as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    return tensors


def read_tensors(path: Path) -> dict[str, FileTensor]:
    """Every tensor of a file by name, in the order of names, in memory of its own.

    Raises:
        CheckpointDamaged: it is missing, or no safetensors file.
    """
    try:
        found = deserialize(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    return {
        key: FileTensor(value["dtype"], tuple(value["shape"]), value["data"])
        for key, value in sorted(found, key=itemgetter(0))
    }
