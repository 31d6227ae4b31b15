"""A full disk, a failing one, kill -9: what was acknowledged stays, what was refused is gone."""

import errno
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from manylora.journal import Journal
from manylora.journal import segment_files as files_module
from manylora.journal.record_format import read_segment
from manylora.types import SaveFailed
from tests.unit.journal.journals import LIMIT, contents, disk_bytes, record, write

# --- a full disk, a failing one -----------------------------------------------------------------


class FullDisk:
    """`os.write` on a disk with so much room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def __call__(self, descriptor: int, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self._write(descriptor, data[: self.room])
        self.room -= done
        return done


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    full = FullDisk(10**9)
    monkeypatch.setattr(files_module.os, "write", full)
    return full


@pytest.mark.parametrize("room", [0, 1, 50, 149])
@pytest.mark.parametrize("segment_bytes", [1, 10**6])
def test_a_full_disk_refuses_and_keeps(
    tmp_path: Path, disk: FullDisk, room: int, segment_bytes: int
):
    with Journal(tmp_path, segment_bytes) as journal:
        write(journal, record("s", 1), record("s", 2))
        for seq in (3, 4):
            disk.room = room
            with pytest.raises(SaveFailed, match="No space left"):
                journal.append(record("s", seq, b"x" * 150)).result(LIMIT)
            assert [one.seq for one in contents(tmp_path)] == [1, 2]
            assert journal.lag()[0] == 2
        disk.room = 10**9
        write(journal, record("s", 5))
        assert [one.seq for one in contents(tmp_path)] == [1, 2, 5]
        assert disk_bytes(journal) == sum(p.stat().st_size for p in tmp_path.glob("*.log"))
    assert [one.seq for one in contents(tmp_path)] == [1, 2, 5]


def test_a_really_full_disk(tmp_path: Path):
    """A file system of one megabyte, where the machine lets us mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        with Journal(tmp_path / "journal", segment_bytes=200_000) as journal:
            refused, kept = 0, []
            for seq in range(200):
                try:
                    journal.append(record("s", seq, b"x" * 10_000)).result(LIMIT)
                    kept.append(seq)
                except SaveFailed:
                    refused += 1
            assert refused > 50 and len(kept) > 50
            assert [one.seq for one in contents(tmp_path / "journal")] == kept
            journal.covered("s", kept[-1] - 10)
            write(journal, *(record("s", 1000 + i, b"x" * 10_000) for i in range(30)))
            after = [one.seq for one in contents(tmp_path / "journal")]
            assert after[-40:] == kept[-10:] + [1000 + i for i in range(30)]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_after_a_failed_flush_the_file_is_not_trusted(tmp_path: Path):
    """The system may have dropped what it could not write; asking again would be answered well."""
    failing = False

    def flush(_: int) -> None:
        if failing:
            raise OSError(errno.EIO, "Input/output error")

    with Journal(tmp_path, flush=flush) as journal:
        write(journal, record("s", 1))
        failing = True
        for seq in (2, 3):
            with pytest.raises(SaveFailed, match="Input/output error"):
                journal.append(record("s", seq)).result(LIMIT)
        failing = False
        write(journal, record("s", 4))
        assert [one.seq for one in contents(tmp_path)] == [1, 4]
        files = sorted(tmp_path.glob("*.log"))
        assert [len(list(read_segment(path))) for path in files] == [1, 1]


def test_what_can_neither_be_flushed_nor_taken_back_is_not_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with Journal(tmp_path) as journal:
        write(journal, record("s", 1))
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> int:
                raise OSError(errno.EIO, "Input/output error")

            disk = FullDisk(20)
            patch.setattr(files_module.os, "write", disk)
            patch.setattr(files_module.os, "ftruncate", refuse)
            with pytest.raises(SaveFailed):
                journal.append(record("s", 2)).result(LIMIT)
        write(journal, record("s", 3))
        recovery = Journal.recover(tmp_path)
        assert [one.seq for one in recovery.records] == [1, 3]
        assert [damage.segment for damage in recovery.damages] == ["00000001.log"]


def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed):
        Journal(tmp_path / "file" / "journal")


# --- kill -9 ------------------------------------------------------------------------------------

WRITER = """
import os, sys, threading
from manylora.journal import Journal, Record
journal = Journal(sys.argv[1], segment_bytes=20_000)
first = int(sys.argv[2])
def work(stream):
    for seq in range(first, first + 100_000):
        body = bytes([seq % 256]) * (seq * 37 % 3000)
        journal.append(Record(stream, seq, "k", "t", f"{stream}:{seq}", "d", body)).result()
        os.write(1, f"{stream} {seq}\\n".encode())
for stream in "abcd":
    threading.Thread(target=work, args=(stream,), daemon=True).start()
threading.Event().wait()
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path):
    rng = random.Random(7)
    acknowledged: dict[str, list[int]] = {stream: [] for stream in "abcd"}
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(attempt * 100_000)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        first = process.stdout.readline()  # it has begun
        time.sleep(rng.random() * 0.15)
        process.kill()
        rest, _ = process.communicate(timeout=LIMIT)
        for line in (first + rest).decode().splitlines(keepends=True):
            if line.endswith("\n"):
                stream, seq = line.split()
                acknowledged[stream].append(int(seq))
        present: dict[str, list[int]] = {stream: [] for stream in "abcd"}
        for one in contents(tmp_path):
            assert one.body == bytes([one.seq % 256]) * (one.seq * 37 % 3000)
            present[one.stream].append(one.seq)
        for stream, seqs in acknowledged.items():
            assert set(seqs) <= set(present[stream])
            assert present[stream] == sorted(present[stream])
    assert sum(len(seqs) for seqs in acknowledged.values()) > 100


def test_many_threads_may_append(tmp_path: Path):
    with Journal(tmp_path, segment_bytes=5_000, flush=lambda _: None) as journal:
        futures: list[list[Future[None]]] = [[] for _ in range(8)]

        def work(number: int) -> None:
            for seq in range(200):
                futures[number].append(journal.append(record(str(number), seq)))
                if seq % 20 == 0:
                    journal.covered(str(number), seq - 40)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait([future for some in futures for future in some], LIMIT)
        for number in range(8):
            seqs = [one.seq for one in contents(tmp_path) if one.stream == str(number)]
            assert seqs == sorted(seqs) and set(range(141, 200)) <= set(seqs)
