"""This module reads and sets what plans depend on of this machine: memory, CPU, allocator."""

import ctypes
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8


def free_host_bytes() -> int:
    """Return the bytes of memory that this process could take now.

    The machine, the control groups that the process is in, and its own limit bound them.
    """
    bounds = [_available(), _address_space_left(), *_left_of_groups()]
    return max(0, min(bound for bound in bounds if bound is not None))


def freed_heap_bytes() -> int:
    """Return the bytes that this process has freed and its allocator keeps for later."""
    if not sys.platform.startswith("linux"):
        return 0
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    return int(mallinfo().fields[_FORDBLKS])


class _Mallinfo(ctypes.Structure):
    """This is glibc's struct mallinfo2: ten sizes."""

    _fields_ = (("fields", ctypes.c_size_t * 10),)


# The index of the total of free blocks among them.
_FORDBLKS = 8


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kibibytes) * 1024


def _address_space_left() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return limit
    return limit - pages * resource.getpagesize()


def _left_of_groups() -> list[int]:
    """Return the bytes that each control group of this process may still take.

    The page cache is not counted.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left: list[int] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        root = CGROUPS / "memory"
        if not controllers:
            root, names = CGROUPS, ("memory.max", "memory.current")
        group = root / name.lstrip("/")
        # In a container the group may be mounted as the root.
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            found = _left_of_group(place, *names)
            left += [] if found is None else [found]
    return left


def _left_of_group(place: Path, limit: str, usage: str) -> int | None:
    try:
        most = int((place / limit).read_text(encoding="ascii"))
        used = int((place / usage).read_text(encoding="ascii"))
        counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no limit
        return None
    cache = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return most - used + cache


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed for want of memory; None if unknown."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def is_intel() -> bool:
    """Return whether the CPU is known to be Intel's."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def set_malloc(wanted: Mapping[int, int]) -> bool:
    """Set parameters of this process's allocator; return False if it is not glibc's or refuses."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(parameter, value) == 1 for parameter, value in wanted.items()]
    return all(accepted)
