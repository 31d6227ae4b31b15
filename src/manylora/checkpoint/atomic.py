"""Folders appear whole or not at all, whatever happens while they are written.

A folder `step-7` is written as `.step-7.partial-<random>` beside it, flushed to the disk, and
renamed. An older `step-7` is first renamed to `.step-7.old-<random>` and deleted once the new one
is in place. Only a killed process leaves either of them behind; `clean_strays` sets them right.

The writer holds a lock (flock) on its partial folder, and the system drops it when the process
dies: a partial folder that can be locked has no living writer.
"""

import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from manylora.checkpoint.manifest import JSON, MANIFEST, manifest_text
from manylora.types import SaveFailed, TooManyFilesOpen
from manylora.types.files import flush_path, tell_shortage_apart

logger = logging.getLogger("manylora.checkpoint")

_STRAY = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-[0-9a-f]{8}")


@contextmanager
def write_folder(
    folder: str | Path, *, kind: str, about: Mapping[str, JSON], manifest_name: str = MANIFEST
) -> Iterator[Path]:
    """Give the body an empty folder to fill, which becomes `folder` when the body ends.

    Args:
        folder: where the contents shall lie. A folder that is there already is replaced only if it
            is empty or has a manifest of that name, so never one that another program made.
        kind, about: what the manifest says of the contents.

    Raises:
        SaveFailed: anything could not be written. `folder` is then as it was before.
    """
    try:
        target = Path(folder).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_strays(target.parent, target.name)
        _refuse_foreign(target, manifest_name)
        partial, lock = _new_partial(target)
    except SaveFailed:
        raise
    except (OSError, TooManyFilesOpen) as error:
        raise SaveFailed(f"{folder} could not be saved: {error}") from error
    try:
        yield partial
        (partial / manifest_name).write_text(manifest_text(kind, about, partial), encoding="utf-8")
        _open_up(partial)
        _flush_tree(partial)
        _publish(partial, target)
    except SaveFailed:
        raise
    except (OSError, SafetensorError) as error:
        raise SaveFailed(f"{folder} could not be saved: {error}") from error
    finally:
        # After a success no folder has that name.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def clean_strays(parent: Path, name: str | None = None) -> None:
    """Remove what killed writers left in `parent`, and put back a folder that was being replaced.

    Folders that a living process is writing are left alone. A folder that cannot be cleaned (a
    read-only disk) is not an error. With `name` only the strays of that folder are looked at.
    Raises TooManyFilesOpen: no descriptor is left; nothing was changed.
    """
    try:
        found = [(path, _STRAY.fullmatch(path.name)) for path in parent.iterdir()]
    except OSError as error:
        tell_shortage_apart(error, parent)  # a folder that is to be put back would seem lost
        return
    strays = [(path, m["name"], m["kind"]) for path, m in found if m and name in (None, m["name"])]
    locks: dict[Path, int | None] = {}
    try:
        for path, _, kind in strays:
            if kind == "partial":
                locks[path] = _try_lock(path)
        alive = {
            of for path, of, _ in strays if path in locks and locks[path] is None and path.exists()
        }
        for path, of, kind in strays:
            if of in alive:
                logger.warning("%s is being written; it is left alone", path)
            elif kind == "old" and not (parent / of).exists():
                logger.warning("%s: put back, a save of %s was cut off", path, parent / of)
                with suppress(OSError):
                    path.rename(parent / of)
            else:
                logger.warning("%s: removed, a save of %s was cut off", path, parent / of)
                shutil.rmtree(path, ignore_errors=True)
    finally:
        for lock in locks.values():
            if lock is not None:
                os.close(lock)


def _refuse_foreign(target: Path, manifest_name: str) -> None:
    if not target.exists() or (target / manifest_name).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise SaveFailed(
            f"{target} exists and has no {manifest_name}, so it is not manylora's to replace; "
            "remove it or save elsewhere"
        )


def _new_partial(target: Path) -> tuple[Path, int]:
    while True:
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a cleaner found it before it was locked, and removes it
            os.close(lock)
            continue
        except OSError as error:  # without locks on this file system no cleaner removes it
            logger.debug("%s: no lock: %s", partial, error)
        if partial.exists():
            return partial, lock
        os.close(lock)


def _try_lock(partial: Path) -> int | None:
    """Return an open, locked descriptor; None if a living process has it or it cannot be told.
    Raises TooManyFilesOpen: no descriptor is left."""
    try:
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        tell_shortage_apart(error, partial)
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _publish(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        partial.rename(target)
        flush_path(target.parent)
    except OSError:
        if target.exists():
            target.rename(partial)
        if replaces:
            old.rename(target)
        raise
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Let every user who may read the folder read its files.

    safetensors makes private files, and an export is for other programs, perhaps other users'. The
    umask decides, as for the folder.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        flush_path(path)
    flush_path(folder)
