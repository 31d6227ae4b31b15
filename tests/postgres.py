"""Tests get a throw-away PostgreSQL server where the machine has the programs."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# The server refuses to run as root; these exist where its package is installed, or anywhere.
_UNPRIVILEGED = ("postgres", "nobody")


def find_programs() -> Path | None:
    """Return the folder with initdb and postgres (Debian leaves them off the search path)."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").exists()), None)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Yield the URL of a fresh server that listens on a socket in a temporary folder only."""
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server on this machine (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed")
    user = _unprivileged_user() if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="manylora-pg-", dir="/tmp"))  # sockets need short paths
    try:
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        _run([programs / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8"], user)
        options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=50"
        control = [programs / "pg_ctl", "-D", data, "-w"]
        _run([*control, "-l", folder / "log", "-o", options, "start"], user)
        try:
            yield f"postgresql+psycopg://tests@/postgres?host={folder}"
        finally:
            _run([*control, "-m", "immediate", "stop"], user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = next((name for name in _UNPRIVILEGED if name in names), None)
    if user is None:
        pytest.skip("PostgreSQL does not run as root, and there is no other user")
    return user


def _run(command: list[str | Path], user: str | None) -> None:
    done = subprocess.run(
        command, user=user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
