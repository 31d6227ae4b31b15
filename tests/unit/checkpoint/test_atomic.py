"""Folders are whole or not there: full disks, failing calls, killed writers, strays.

Faults that were planted and seen to fail here: the manifest written first, the old folder deleted
before the rename, no rollback, no restore of a folder that was being replaced, no lock.
"""

import errno
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manylora.checkpoint import clean_strays, load_state, save_state, verify, write_folder
from manylora.types import SaveFailed
from tests.unit.checkpoint.states import state_of

REPO = Path(__file__).resolve().parents[3]


def write(folder: Path, text: str) -> None:
    with write_folder(folder, kind="test", about={}) as partial:
        (partial / "a.txt").write_text(text)
        (partial / "deep").mkdir()
        (partial / "deep" / "b.txt").write_text(text)


def save(folder: Path, step: int) -> None:
    save_state(folder, state_of(step=step), base_name="t", base_fingerprint="f", client={})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_and_is_replaced(tmp_path: Path):
    for text in ("one", "two"):
        write(tmp_path / "new" / "x", text)
        assert (tmp_path / "new" / "x" / "deep" / "b.txt").read_text() == text
        assert set(verify(tmp_path / "new" / "x").files) == {"a.txt", "deep/b.txt"}
        assert names(tmp_path / "new") == ["x"]


def test_nothing_is_seen_before_it_is_whole(tmp_path: Path):
    with write_folder(tmp_path / "x", kind="test", about={}) as partial:
        (partial / "a.txt").write_text("a")
        assert not (tmp_path / "x").exists()
        assert partial.name.startswith(".x.partial-") and partial.parent == tmp_path


def test_a_failing_body_leaves_everything_as_it_was(tmp_path: Path):
    write(tmp_path / "x", "one")
    with (
        pytest.raises(ZeroDivisionError),
        write_folder(tmp_path / "x", kind="test", about={}) as partial,
    ):
        (partial / "a.txt").write_text("two")
        raise ZeroDivisionError
    assert (tmp_path / "x" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["x"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("home", "file"):
        with pytest.raises(SaveFailed, match="not manylora's to replace"):
            write(tmp_path / name, "x")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "x")
    assert names(tmp_path) == ["empty", "file", "home"]


# --- disks that are full or broken ------------------------------------------------------------


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file may grow past this, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [0, 500, 2000])
def test_a_write_that_fails_keeps_the_earlier_state(tmp_path: Path, num_bytes: int):
    save(tmp_path / "a", 1)
    with small_files(num_bytes), pytest.raises(SaveFailed, match=str(tmp_path / "a")):
        save(tmp_path / "a", 2)
    assert names(tmp_path) == ["a"]
    assert load_state(tmp_path / "a").state.step == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_earlier_state(small_disk: Path):
    save(small_disk / "a", 1)
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free - 8192))
    with pytest.raises(SaveFailed, match=r"(?i)no space left"):
        save(small_disk / "a", 2)
    assert names(small_disk) == ["a", "ballast"]
    assert load_state(small_disk / "a").state.step == 1
    ballast.unlink()
    save(small_disk / "a", 2)
    assert load_state(small_disk / "a").state.step == 2


def test_a_disk_that_cannot_flush_keeps_the_earlier_state(tmp_path: Path, monkeypatch):
    """Fail at the first flush, then at the second, …: also after the new folder is in place."""
    save(tmp_path / "a", 1)
    flush = os.fsync
    failures = 0
    while True:
        left = failures

        def failing(descriptor: int) -> None:
            nonlocal left
            if left == 0:
                raise OSError(errno.EIO, "the disk is broken")
            left -= 1
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            save(tmp_path / "a", 2)
        except SaveFailed as error:
            assert "the disk is broken" in str(error)
        else:
            break
        assert names(tmp_path) == ["a"]  # before loading, which would clean up
        assert load_state(tmp_path / "a").state.step == 1
        failures += 1
    # Three files, their folder, and the folder that holds it.
    assert failures == 5
    assert load_state(tmp_path / "a").state.step == 2


def test_a_parent_that_is_a_file_is_a_failed_save(tmp_path: Path):
    (tmp_path / "f").write_text("")
    with pytest.raises(SaveFailed, match="could not be saved"):
        write(tmp_path / "f" / "x", "one")


# --- killed writers ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kill", "calls"])
def test_crashes(tmp_path: Path, way: str):
    program = [sys.executable, "-m", "tests.unit.checkpoint.crashing_saver", way, str(tmp_path)]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO / "src")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no writer died in the middle of a save: this tested nothing"


def test_a_stray_is_ignored_and_removed(tmp_path: Path, caplog):
    stray = tmp_path / ".x.partial-0123abcd"
    stray.mkdir()
    (stray / "a.txt").write_text("half")
    with caplog.at_level(logging.WARNING, logger="manylora.checkpoint"):
        write(tmp_path / "x", "one")
    assert names(tmp_path) == ["x"]
    assert ".x.partial-0123abcd" in caplog.text


def test_other_peoples_hidden_folders_are_left_alone(tmp_path: Path):
    for name in (".git", ".x.partial", ".x.partial-notes", ".x.old-", "x.old-0123abcd"):
        (tmp_path / name).mkdir()
    clean_strays(tmp_path)
    assert len(names(tmp_path)) == 5


def test_a_folder_that_is_being_written_is_left_alone(tmp_path: Path):
    with write_folder(tmp_path / "x", kind="test", about={}) as partial:
        (partial / "a.txt").write_text("one")
        clean_strays(tmp_path)
        write(tmp_path / "x", "the other one")  # another writer of the same name
        assert (partial / "a.txt").read_text() == "one"
    assert (tmp_path / "x" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["x"]


def test_a_folder_that_was_being_replaced_comes_back(tmp_path: Path):
    save(tmp_path / "a", 1)
    (tmp_path / "a").rename(tmp_path / ".a.old-0123abcd")
    (tmp_path / ".a.partial-0123abcd").mkdir()
    assert load_state(tmp_path / "a").state.step == 1
    assert names(tmp_path) == ["a"]


def test_weights_larger_than_a_chunk_are_hashed_whole(tmp_path: Path):
    with write_folder(tmp_path / "x", kind="test", about={}) as partial:
        (partial / "big").write_bytes(bytes(3 << 20))
    with (tmp_path / "x" / "big").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(Exception, match="big was altered"):
        verify(tmp_path / "x")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_as_open_as_the_umask_says(tmp_path: Path, umask: int):
    """safetensors makes files that only their owner may read, whatever the umask is."""
    before = os.umask(umask)
    try:
        write(tmp_path / "x", "one")
        save(tmp_path / "state", 1)
        with write_folder(tmp_path / "private", kind="test", about={}) as partial:
            (partial / "a").touch(0o600)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".txt", ".safetensors"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o777 & ~umask}
