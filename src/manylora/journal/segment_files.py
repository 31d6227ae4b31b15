"""A power failure finds these files either there or not, thanks to the system's calls here."""

import fcntl
import logging
import os
from pathlib import Path

from manylora.types import StoreError
from manylora.types.files import flush_path

log = logging.getLogger("manylora.scheduler")


def flush_data(descriptor: int) -> None:
    """Make the system write a file's bytes to the disk."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the data: a file may take a part at a time."""
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
    """Make a folder whose name, and whose parents' names, are on the disk."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        flush_path(path.parent)


def new_file(path: Path) -> int:
    """Make an empty file whose name is on the disk; return its descriptor."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        flush_path(path.parent)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def lock_folder(folder: Path) -> int:
    """Return a descriptor that holds the folder for this process; the system drops it with that."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(f"the journal {folder} is in use") from None
    except OSError as error:  # a file system without locks
        log.warning("%s: no lock: %s", folder, error)
    return descriptor
