"""Files that a power failure finds either there or not: the system's calls behind the journal."""

import fcntl
import logging
import os
from pathlib import Path

from manylora.types import StoreError

log = logging.getLogger("manylora.scheduler")


def flush_data(descriptor: int) -> None:
    """Make the system write a file's bytes to the disk."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def flush(path: Path) -> None:
    """Make the system write a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """A file may take a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def cut(path: Path, size: int) -> None:
    """Shorten a file, for good."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """A folder whose name, and whose parents' names, are on the disk."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        flush(path.parent)


def new_file(path: Path) -> int:
    """An empty file whose name is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        flush(path.parent)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def lock_folder(folder: Path) -> int:
    """A descriptor that holds the folder for this process; the system drops it with the process."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(f"the journal {folder} is in use") from None
    except OSError as error:  # a file system without locks
        log.warning("%s: no lock: %s", folder, error)
    return descriptor
