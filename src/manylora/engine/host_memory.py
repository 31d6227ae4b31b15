"""Free memory is looked up here, and what a step has freed is kept for the next one.

A training step on CPU allocates and frees the same large tensors over and over. By default glibc
returns the top of the heap after each, and the next step faults every page in again: on two cores
about a tenth of a step of the toy benchmark went there.
"""

import math
import time

import torch

from manylora.models.base_memory import free_bytes
from manylora.types.machine import (
    M_ARENA_MAX,
    M_MMAP_THRESHOLD,
    M_TOP_PAD,
    M_TRIM_THRESHOLD,
    set_malloc,
)


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next allocation; False where there is no glibc.

    One arena, because the engine allocates on a single thread, and only the main arena can keep
    blocks of any size.
    """
    return set_malloc(
        {
            M_ARENA_MAX: 1,
            M_MMAP_THRESHOLD: 32 << 20,  # the largest that glibc accepts
            M_TRIM_THRESHOLD: (1 << 31) - 1,
            M_TOP_PAD: 64 << 20,
        }
    )


def is_exhaustion(error: BaseException) -> bool:
    """Say whether an error means that the host or a device has no more memory."""
    # The CPU's allocator has no class of its own.
    words = "DefaultCPUAllocator: can't allocate memory"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or words in str(error)


class FreeMemory:
    """A `FreeMemory` looks a device's free memory up again only where it could matter.

    The system takes half a millisecond to two for an answer. Asked for every operation, that was
    a twentieth of a step of eight.
    """

    # Of the last reading, what may be taken without another one for so many seconds.
    SHARE, SECONDS = 0.25, 1.0

    def __init__(self, device: torch.device):
        self._device = device
        self._found = 0
        self._read = -math.inf

    def now(self) -> int:
        """Return the bytes that could be taken now."""
        self._found = free_bytes(self._device)
        self._read = time.monotonic()
        return self._found

    def beside(self, needed: int) -> int:
        """Return the bytes that could be taken, exact only if `needed` is a good part of them."""
        recent = time.monotonic() - self._read <= self.SECONDS
        if not recent or needed > self._found * self.SHARE:
            return self.now()
        return self._found
