"""Parts of a base's tensors are read out of its safetensors files.

Files are opened for one tensor at a time: what has been read of a mapped file counts as the
process's memory for as long as it is mapped.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from manylora.types import BaseModelError, Unsupported

# The types of safetensors that a base's parameters come in, and the bytes of each as numpy knows.
STORED = {
    "F64": (torch.float64, np.float64),
    "F32": (torch.float32, np.float32),
    "F16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, np.int16),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A `Stored` is a tensor in a file: the file, its first byte there, its type and shape."""

    file: str
    start: int
    kind: str
    shape: tuple[int, ...]


class TensorFiles:
    """`TensorFiles` have the tensors of a folder or hub id, by name."""

    def __init__(self, folder: str):
        """Read the files' tables of contents. Raises BaseModelError: no safetensors files, or
        damaged ones."""
        self.folder = folder
        self.stored: dict[str, Stored] = {}
        try:
            for file in _files(folder):
                self.stored.update(_contents(file))
        except (OSError, ValueError, KeyError) as error:
            raise BaseModelError(
                f"base {folder!r} cannot be read in parts: {error}. A mesh needs safetensors files"
            ) from error

    def part(self, name: str, slices: Sequence[slice]) -> Tensor:
        """Return a tensor's part, on the CPU and as stored. Raises BaseModelError."""
        try:
            with safe_open(self.stored[name].file, framework="pt") as opened:
                # A rank without a row has nothing to read, and the reader refuses that.
                if any(one.stop <= one.start for one in slices):
                    shape = [max(0, one.stop - one.start) for one in slices]
                    return torch.empty(shape, dtype=STORED[self.stored[name].kind][0])
                return opened.get_slice(name)[tuple(slices)]
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"base {self.folder!r}: {name} cannot be read: {error}") from error

    def every(self, name: str, stride: int, count: int) -> Tensor:
        """Read every `stride`-th value of a flattened tensor, at most `count` of them."""
        stored = self.stored[name]
        kind, bits = STORED[stored.kind]
        mapped = np.memmap(stored.file, bits, "r", stored.start, (int(np.prod(stored.shape)),))
        return torch.from_numpy(np.array(mapped[::stride][:count])).view(kind)


def _files(folder: str) -> list[str]:
    index = cached_file(
        folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        return list(get_checkpoint_shard_files(folder, index)[0] or ())
    found = cached_file(folder, SAFE_WEIGHTS_NAME)
    assert found is not None
    return [found]


def _contents(file: str) -> dict[str, Stored]:
    """Read the file's header: 8 bytes of its length, then JSON."""
    with Path(file).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > Path(file).stat().st_size:
            raise ValueError(f"{file} is cut short")
        header = json.loads(stream.read(length))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in STORED:
            raise Unsupported(
                f"{file}: {name} is stored as {entry['dtype']}; on a mesh a base is read from "
                f"{', '.join(STORED)}"
            )
        start = 8 + length + entry["data_offsets"][0]
        found[name] = Stored(file, start, entry["dtype"], tuple(entry["shape"]))
    return found
