"""Small files are written whole or not at all; a lack of descriptors is told from damage."""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from manylora.types.errors import TooManyFilesOpen

_NONE_LEFT = (errno.EMFILE, errno.ENFILE)


def write_whole(path: Path, data: bytes) -> None:
    """Write a private file (0600) so that a crash leaves the old one, the new one, or none.

    It is written aside, flushed and renamed, and its folder is flushed. Raises OSError: it could
    not be written; the file that was there before still is.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        flush_path(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def flush_path(path: Path) -> None:
    """Make the system write a file's bytes, or a folder's list of names, to the disk. Raises
    OSError: the system could not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_descriptor_left(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came of, is that no descriptor is left.

    This process or the machine has then as many files open as it may: nothing is broken, and it
    is over when one is closed.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        none_left = isinstance(error, OSError) and error.errno in _NONE_LEFT
        if none_left or isinstance(error, TooManyFilesOpen):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def tell_shortage_apart(error: BaseException, what: object) -> None:
    """Raise `TooManyFilesOpen` if an error, by which `what` could not be read, comes of descriptors
    that have run out.

    It is called before the error is taken for a sign that something is damaged or missing.
    """
    if no_descriptor_left(error):
        raise TooManyFilesOpen(
            f"{what} cannot be read now: as many files are open as may be; try again soon"
        ) from error
