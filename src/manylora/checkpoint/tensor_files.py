"""Tensors are read and written without torch: fp32 in memory, fp32, bf16 or fp16 in safetensors.

numpy has no bf16. Its numbers are the upper halves of fp32 numbers, and are held as uint16.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from manylora.lora.state import Floats
from manylora.types import CheckpointDamaged, CheckpointMismatch
from manylora.types.adapter_spec import DType
from manylora.types.files import tell_shortage_apart
from manylora.types.machine import free_host_bytes, freed_heap_bytes
from manylora.types.memory import admit, bytes_text

Encoded: TypeAlias = npt.NDArray[Any]

# dtype → its names when safetensors writes and when it reads, and its numbers in memory.
_FORMATS: dict[DType, tuple[str, str, npt.DTypeLike]] = {
    "fp32": ("float32", "F32", np.float32),
    "bf16": ("bfloat16", "BF16", np.uint16),
    "fp16": ("float16", "F16", np.float16),
}
DTYPES = tuple(_FORMATS)
_BF16_NAN = 0x7FC0


# The library accepts headers of 100 MB, which as objects are more than a gigabyte.
MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A `FileTensor` is a tensor in a file; nothing of it is in memory.

    Attributes:
        dtype: dtype as safetensors calls it (`F32`, `I64`, …).
        start: offset in the file where its bytes, which are row-major, begin.
        stop: offset where they end.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def known(self) -> DType | None:
        """The tensor has this dtype by our name; None if it is none of ours."""
        return next((name for name, (_, read, _) in _FORMATS.items() if read == self.dtype), None)

    def fp32(self) -> Floats:
        """Read its numbers, exactly, into new memory. Its dtype must be one of ours.

        Raises:
            CheckpointDamaged: the file was cut in the meantime.
            TooManyFilesOpen: no descriptor is left.
        """
        dtype = self.known
        assert dtype is not None
        in_memory = np.dtype(_FORMATS[dtype][2])
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                numbers = np.fromfile(
                    file, in_memory, (self.stop - self.start) // in_memory.itemsize
                )
            return decoded(numbers, dtype).reshape(self.shape)
        except (OSError, ValueError) as error:
            tell_shortage_apart(error, self.path)
            raise CheckpointDamaged(f"{self.path} cannot be read: {error}") from error


def encoded(values: Floats, dtype: DType) -> Encoded:
    """Return a copy of `values` in `dtype`, rounded to nearest, ties to even; bf16 as its bits."""
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
    """Return a copy in fp32 of what `encoded` returned."""
    if dtype == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def rounded(values: Floats, dtype: DType) -> Floats:
    """Return fp32 `values` as they are once rounded to `dtype`."""
    return decoded(encoded(values, dtype), dtype)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Encoded],
    dtype: DType,
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write arrays that `encoded` returned, of any shape and strides. Raises OSError,
    SafetensorError: the file could not be written."""
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


def read_fp32(
    path: Path, check: Callable[[Mapping[str, FileTensor]], None] = lambda tensors: None
) -> dict[str, Floats]:
    """Read every tensor of a file that holds nothing but fp32, each into new memory.

    Args:
        check: called with the file's tensors before any numbers are read.

    Raises:
        CheckpointDamaged: the file is missing, or no safetensors file.
        CheckpointMismatch: a tensor is of another dtype.
        DoesNotFit: there is no memory for the tensors.
    """
    tensors = read_tensors(path)
    for key, tensor in tensors.items():
        if tensor.known != "fp32":
            raise CheckpointMismatch(f"{path}: {key} is {tensor.dtype}; only F32 belongs there")
    check(tensors)
    admit_tensors(path, tensors.values())
    return {key: tensor.fp32() for key, tensor in tensors.items()}


def admit_tensors(path: Path, tensors: Iterable[FileTensor]) -> None:
    """Raise `DoesNotFit` unless there is memory for the tensors as fp32."""
    needed = 4 * sum(math.prod(tensor.shape) for tensor in tensors)
    free = free_host_bytes() + freed_heap_bytes()
    admit(f"what {path} holds", needed, free, f"as much as {bytes_text(free)} would fit")


def _check_header(path: Path) -> None:
    """Let the safetensors library check the header, since it knows what a right one is."""
    try:
        with safe_open(path, framework="np"):
            return
    except FileNotFoundError as error:
        # It says so of any file that it could not open. This one was opened a moment ago.
        if path.exists():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path)) from error
        raise


def read_tensors(path: Path) -> dict[str, FileTensor]:
    """Return a file's tensors by name and in the order of names; no numbers are read.

    The header is compared with the file: its length, and whether the tensors' bytes fill the rest.

    Raises:
        CheckpointDamaged: the file is missing, or no safetensors file.
        TooManyFilesOpen: no descriptor is left, so the file could not be read.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(
                    f"its header claims {size:,} bytes, more than {MAX_HEADER_BYTES:,}"
                )
            _check_header(path)
            header = json.loads(file.read(size))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        tell_shortage_apart(error, path)
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    found = {}
    for key, entry in sorted(header.items()):
        if key != "__metadata__":
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            found[key] = FileTensor(path, entry["dtype"], tuple(entry["shape"]), first, last)
    return found
