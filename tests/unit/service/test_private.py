"""The server's own files: closed to others, whole after a crash, and refused when they are not.

Faults that were planted and seen to fail here: the key written in place, a short key used, modes
left as they were.
"""

import logging
import os
import stat
from pathlib import Path

import pytest

from manylora.service import private_files as private
from manylora.service.private_files import keep_private, signing_secret
from manylora.store import Store
from manylora.types import SaveFailed, StoreError
from manylora.types import files as whole_files
from manylora.types.files import no_descriptor_left, write_whole


@pytest.fixture(autouse=True)
def own_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_made_once_and_is_nobody_elses(tmp_path: Path):
    secret = signing_secret(tmp_path / "data")
    assert len(secret) == 32
    assert signing_secret(tmp_path / "data") == secret
    assert mode(tmp_path / "data" / "signing.key") == 0o600
    assert signing_secret(tmp_path / "other") != secret
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["signing.key"]


@pytest.mark.parametrize("left", [b"", b"x", b"k" * 31, b"k" * 33, b"\0" * 32, b"k" * 64])
def test_what_is_no_key_is_refused_by_name(tmp_path: Path, left: bytes):
    (tmp_path / "signing.key").write_bytes(left)
    with pytest.raises(StoreError, match=r"signing\.key.*delete it") as refused:
        signing_secret(tmp_path)
    assert left == b"" or left.decode("latin-1") not in str(refused.value)
    assert (tmp_path / "signing.key").read_bytes() == left


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_crash_while_the_key_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    """Whatever call the process does not survive, the next start finds no key, or the whole one."""

    class Crash(BaseException):
        pass

    def crash(*args: object) -> None:
        raise Crash

    if call == "replace":
        monkeypatch.setattr(Path, "replace", crash)
    elif call == "fsync":
        monkeypatch.setattr(whole_files.os, "fsync", crash)
    else:
        monkeypatch.setattr(private.secrets, "token_bytes", crash)
    with pytest.raises(Crash):
        signing_secret(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "signing.key").exists()
    assert len(signing_secret(tmp_path)) == 32


def test_a_key_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files.os, "fsync", full)
    with pytest.raises(SaveFailed, match=r"signing\.key cannot be written"):
        signing_secret(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_replaces_an_older_one(tmp_path: Path):
    path = tmp_path / "token"
    for data in (b"one", b"two"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_data_folder_that_was_open_is_closed_to_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    for name in ("journal", "results", "checkpoints", "mine"):
        (tmp_path / name).mkdir()
    for name in ("manylora.db", "signing.key", "notes.txt"):
        (tmp_path / name).write_text("x")
    tmp_path.chmod(0o755)
    keep_private(tmp_path)
    for name in ("journal", "results", "checkpoints"):
        assert mode(tmp_path / name) == 0o700
    for name in ("manylora.db", "signing.key"):
        assert mode(tmp_path / name) == 0o600
    # What is not ours stays as it is, and whose folder it is learns how to close it.
    assert (mode(tmp_path / "mine"), mode(tmp_path / "notes.txt")) == (0o755, 0o644)
    assert f"chmod 700 {tmp_path}" in caplog.text
    caplog.clear()
    tmp_path.chmod(0o700)
    keep_private(tmp_path)
    assert not caplog.records
    (tmp_path / "later").write_text("x")
    assert mode(tmp_path / "later") == 0o600


def test_a_new_database_is_nobody_elses(tmp_path: Path):
    tmp_path.chmod(0o755)
    with Store.in_folder(tmp_path) as store:
        store.keys.create("ann")
        assert {mode(path) for path in tmp_path.glob("manylora.db*")} == {0o600}


def test_a_shortage_of_descriptors_is_told_from_other_errors():
    try:
        try:
            raise OSError(24, "Too many open files")
        except OSError as error:
            raise SaveFailed("not saved") from error
    except SaveFailed as error:
        assert no_descriptor_left(error)
    assert no_descriptor_left(OSError(23, "Too many open files in system"))
    assert not no_descriptor_left(OSError(28, "No space left on device"))
    assert not no_descriptor_left(SaveFailed("x"))
    assert not no_descriptor_left(None)
