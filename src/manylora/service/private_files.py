"""No other user of this machine may read what a server keeps in its data folder."""

import logging
import os
import secrets
import stat
from pathlib import Path

from manylora.service.http.signing import SECRET_BYTES
from manylora.types import SaveFailed, StoreError
from manylora.types.files import write_whole

log = logging.getLogger("manylora.service")

SIGNING_KEY = "signing.key"
# What a server makes in its data folder; whatever else lies there is none of its business.
_FOLDERS = ("adapters", "snapshots", "checkpoints", "journal", "results", "runs")
OURS = (*_FOLDERS, SIGNING_KEY, "manylora.db", "manylora.db-wal", "manylora.db-shm")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def keep_private(folder: Path) -> None:
    """Let no other user read what this process writes from now on, or what its data folder holds.
    What cannot be changed is named in the log."""
    os.umask(_OTHERS)
    for name in OURS:
        path = folder / name
        try:
            mode = path.lstat().st_mode
            if mode & _OTHERS and not stat.S_ISLNK(mode):
                path.chmod(stat.S_IMODE(mode) & ~_OTHERS)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("others can read %s: %s; chmod go-rwx it", path, error.strerror)
    if folder.is_dir() and folder.stat().st_mode & _OTHERS:
        log.warning(
            "others can look into %s; what this server keeps there is closed to them, and "
            "`chmod 700 %s` closes the rest",
            folder,
            folder,
        )


def signing_secret(folder: Path) -> bytes:
    """Return the key of download addresses; made once, readable by no other user.

    Raises:
        SaveFailed: it cannot be written or read.
        StoreError: what lies there is no key: who guesses it could download without one.
    """
    path = folder / SIGNING_KEY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, secrets.token_bytes(SECRET_BYTES))
        secret = path.read_bytes()
    except OSError as error:
        raise SaveFailed(f"{path} cannot be written: {error}") from error
    if len(secret) != SECRET_BYTES or not any(secret):
        what = "nothing but zeros" if secret and not any(secret) else f"{len(secret)} bytes"
        raise StoreError(
            f"{path} holds {what} where a key has {SECRET_BYTES} random bytes, as a crash may "
            "leave it: delete it and start again; download addresses made so far end with it"
        )
    return secret
