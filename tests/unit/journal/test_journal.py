"""Writing: what is durable when, what stays, and what goes."""

import errno
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from manylora.journal import Journal, Record
from manylora.journal import segment_files as files_module
from manylora.journal.record_format import encode, read_segment
from manylora.types import DataError, SaveFailed, StoreError
from tests.unit.journal.journals import LIMIT, contents, disk_bytes, names, record, write


@pytest.fixture
def one_a_segment(tmp_path: Path) -> Iterator[Journal]:
    """Every record fills a segment."""
    with Journal(tmp_path, segment_bytes=1) as journal:
        yield journal


# --- what was acknowledged is there -------------------------------------------------------------


def test_what_was_written_comes_back_in_order(tmp_path: Path):
    odd = "half \ud800, zero \0, ünï"
    records = [
        record("a", 1),
        record("b", -5, b""),
        record("a", 2, os.urandom(100_000), meta={"n": 1, "deep": {"x": [None, odd]}}),
        record(odd, 0, b"\xf7mlJrec\x01\xf7mlJrec\x00\xf7mlJrec" * 3, tenant=odd, digest=odd),
        record("a", 2**63 - 1, b"\xf7mlJre"),
    ]
    with Journal(tmp_path) as journal:
        write(journal, *records)
        assert contents(tmp_path) == records
        assert journal.lag() == (5, disk_bytes(journal))
    assert contents(tmp_path) == records
    with Journal(tmp_path) as journal:  # it goes on in a new segment
        write(journal, record("c", 1))
        assert journal.lag() == (6, disk_bytes(journal))
        assert contents(tmp_path) == [*records, record("c", 1)]


def test_one_flush_serves_all_who_wait(tmp_path: Path):
    """Nobody is answered before the flush that covers the record, and few flushes do."""
    allowed, flushes = threading.Semaphore(0), []

    def flush(descriptor: int) -> None:
        assert allowed.acquire(timeout=LIMIT)
        flushes.append(os.fstat(descriptor).st_size)

    with Journal(tmp_path, flush=flush) as journal:
        first = journal.append(record("s", 0))
        time.sleep(0.05)  # the writer is waiting in its flush
        rest = [journal.append(record("s", i)) for i in range(1, 50)]
        time.sleep(0.05)
        assert not any(future.done() for future in (first, *rest))
        allowed.release()
        first.result(LIMIT)
        time.sleep(0.05)
        assert not any(future.done() for future in rest)
        allowed.release()
        assert not wait(rest, LIMIT).not_done
        assert len(flushes) == 2 and flushes[1] == disk_bytes(journal)


def test_a_new_files_name_is_flushed_before_anybody_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A durable file that no folder lists is gone after a power failure."""
    flushed: list[Path] = []
    monkeypatch.setattr(files_module, "flush_path", flushed.append)
    folder = tmp_path / "data" / "journal"
    with Journal(folder) as journal:
        assert set(flushed) == {tmp_path, tmp_path / "data"}
        flushed.clear()
        write(journal, record("s", 1), record("s", 2))
        assert flushed == [folder]


def test_a_new_file_whose_name_cannot_be_flushed_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Journal(tmp_path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(files_module, "flush_path", fail)
            for seq in (1, 2):
                with pytest.raises(SaveFailed, match="Input/output error"):
                    journal.append(record("s", seq)).result(LIMIT)
            assert names(tmp_path) == []
        write(journal, record("s", 3))
        assert contents(tmp_path) == [record("s", 3)]


def test_an_answer_cannot_be_cancelled(tmp_path: Path):
    """A client that goes away while it waits does not take its acknowledged work with it."""
    with Journal(tmp_path) as journal:
        future = journal.append(record())
        assert not future.cancel()
        future.result(LIMIT)
    assert contents(tmp_path) == [record()]


def test_closing_writes_what_waits_and_refuses_what_comes(tmp_path: Path):
    journal = Journal(tmp_path)
    futures = [journal.append(record("s", i, b"x" * 1000)) for i in range(500)]
    journal.close()
    journal.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(SaveFailed, match="closed"):
        journal.append(record("s", 501)).result(LIMIT)
    assert len(contents(tmp_path)) == 500


def test_one_process_writes(tmp_path: Path):
    with Journal(tmp_path), pytest.raises(StoreError, match="in use"):
        Journal(tmp_path)
    Journal(tmp_path).close()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"meta": {"x": object()}}, "not JSON serializable"),
        ({"seq": 2**63}, "63 bits"),
        ({"seq": "1"}, "a number"),
        ({"body": 3.5}, "float"),
    ],
)
def test_a_record_that_cannot_be_written_fails_alone(
    tmp_path: Path, wrong: dict[str, Any], words: str
):
    with Journal(tmp_path, flush=lambda _: time.sleep(0.02)) as journal:
        good = [journal.append(record("s", i)) for i in range(3)]
        if "body" in wrong:
            with pytest.raises(TypeError):
                journal.append(record(**wrong))
        else:
            with pytest.raises(DataError, match=words):
                journal.append(record(**wrong)).result(LIMIT)
        good.append(journal.append(record("s", 3)))
        assert not wait(good, LIMIT).not_done
    assert [one.seq for one in contents(tmp_path)] == [0, 1, 2, 3]


def test_a_body_has_a_limit(tmp_path: Path):
    with Journal(tmp_path, max_record_bytes=10) as journal:
        write(journal, record(body=b"x" * 10))
        with pytest.raises(DataError, match="11 bytes; a request may have 10"):
            journal.append(record(body=b"x" * 11))
    # What was let in stays readable, whatever the limit is later.
    with Journal(tmp_path, max_record_bytes=1) as journal:
        assert journal.lag()[0] == 1 and len(contents(tmp_path)) == 1


# --- what is needed stays, the rest goes --------------------------------------------------------


def test_a_segment_stays_as_long_as_anybody_needs_it(tmp_path: Path):
    size = len(encode(record("a", 1)))
    with Journal(tmp_path, segment_bytes=4 * size) as journal:
        write(journal, *(record(stream, seq) for seq in (1, 2) for stream in "ab"))
        write(journal, *(record("a", seq) for seq in (3, 4, 5, 6)))
        write(journal, record("a", 7))
        assert names(tmp_path) == ["00000001.log", "00000002.log", "00000003.log"]
        journal.covered("a", 6)
        assert names(tmp_path) == ["00000001.log", "00000003.log"]
        assert journal.lag() == (3, 3 * size)
        journal.covered("b", 1)
        assert names(tmp_path) == ["00000001.log", "00000003.log"]
        assert journal.streams() == ["a", "b"]
        journal.covered("b", 2)
        assert names(tmp_path) == ["00000003.log"]
        assert journal.lag() == (1, size)
        assert contents(tmp_path) == [record("a", 7)]
        journal.covered("a", 7)
    assert names(tmp_path) == []


def test_a_stream_that_is_over_holds_nothing(one_a_segment: Journal, tmp_path: Path):
    write(one_a_segment, *(record(stream, seq) for seq in (1, 2) for stream in "ab"))
    one_a_segment.forget("a")
    one_a_segment.forget("never heard of")
    assert [(one.stream, one.seq) for one in contents(tmp_path)] == [("b", 1), ("b", 2)]
    # The name may come again, with numbers from one.
    write(one_a_segment, record("a", 1))
    one_a_segment.forget("b")
    assert one_a_segment.streams() == ["a"]
    assert contents(tmp_path) == [record("a", 1)]


def test_after_a_restart_everything_is_needed_until_its_owner_says_otherwise(tmp_path: Path):
    with Journal(tmp_path, segment_bytes=1) as journal:
        write(journal, *(record("a", seq) for seq in range(6)))
        journal.covered("a", 2)
    with Journal(tmp_path, segment_bytes=1) as journal:
        assert [one.seq for one in contents(tmp_path)] == [3, 4, 5]
        assert journal.streams() == ["a"] and journal.lag()[0] == 3
        journal.covered("a", 4)
        assert [one.seq for one in contents(tmp_path)] == [5]


def test_a_note_is_kept_as_long_as_what_it_is_about(one_a_segment: Journal, tmp_path: Path):
    note = record("a", 1, b"no such token", kind="failed")
    write(one_a_segment, record("a", 1))
    one_a_segment.note(note).result(LIMIT)
    assert contents(tmp_path) == [record("a", 1), note]
    one_a_segment.covered("a", 1)
    one_a_segment.note(note).result(LIMIT)  # too late to matter
    assert one_a_segment.lag() == (0, 0)
    assert disk_bytes(one_a_segment) == len(encode(note))  # the first one, in the last segment


def test_who_holds_the_oldest_segments_is_named(one_a_segment: Journal):
    size = len(encode(record("a", 1)))
    write(one_a_segment, *(record(stream, 1) for stream in "cabd"))
    assert one_a_segment.lagging(4 * size) == []
    assert one_a_segment.lagging(4 * size - 1) == ["c"]
    assert one_a_segment.lagging(2 * size) == ["c", "a"]
    assert one_a_segment.lagging(0) == ["c", "a", "b", "d"]
    one_a_segment.forget("a")
    assert one_a_segment.lagging(2 * size) == ["c"]


class JournalMachine(RuleBasedStateMachine):
    """The journal against a list of records, with restarts between."""

    folder: Path
    runs = 0

    @initialize(segment_bytes=st.sampled_from([1, 200, 500]))
    def begin(self, segment_bytes: int) -> None:
        JournalMachine.runs += 1
        self.path = self.folder / str(JournalMachine.runs)
        self.segment_bytes = segment_bytes
        self.journal = Journal(self.path, segment_bytes, flush=lambda _: None)
        self.written: list[Record] = []
        self.needed: list[Record] = []
        self.covered: dict[str, int] = {}

    @rule(stream=st.sampled_from("abc"), seq=st.integers(0, 9), body=st.binary(max_size=99))
    def append(self, stream: str, seq: int, body: bytes) -> None:
        one = record(stream, seq, body, kind=str(len(self.written)))
        self.journal.append(one).result(LIMIT)
        self._wrote(one)

    @rule(stream=st.sampled_from("abc"), seq=st.integers(0, 9))
    def note(self, stream: str, seq: int) -> None:
        one = record(stream, seq, kind=f"failed {len(self.written)}")
        self.journal.note(one).result(LIMIT)
        if seq > self.covered.get(stream, -1):
            self._wrote(one)

    @rule(stream=st.sampled_from("abc"), seq=st.integers(0, 9))
    def cover(self, stream: str, seq: int) -> None:
        self.journal.covered(stream, seq)
        self.covered[stream] = max(seq, self.covered.get(stream, -1))
        self.needed = [r for r in self.needed if r.stream != stream or r.seq > seq]

    @rule(stream=st.sampled_from("abc"))
    def forget(self, stream: str) -> None:
        self.journal.forget(stream)
        self.covered.pop(stream, None)
        self.needed = [r for r in self.needed if r.stream != stream]

    @rule()
    @precondition(lambda self: self.written)
    def restart(self) -> None:
        self.journal.close()
        self.journal = Journal(self.path, self.segment_bytes, flush=lambda _: None)
        present, covered = contents(self.path), self.covered
        self.needed, self.covered = present, {}
        assert self.journal.lag()[0] == len(present)
        for stream, seq in covered.items():
            self.cover(stream, seq)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "journal"):
            return
        present = contents(self.path)
        assert [r for r in self.written if r in present] == present
        assert [r for r in present if r in self.needed] == self.needed
        assert self.journal.lag() == (len(self.needed), sum(len(encode(r)) for r in self.needed))
        assert set(self.journal.streams()) == {r.stream for r in self.needed}
        assert set(self.journal.lagging(0)) == {r.stream for r in self.needed}
        files = sorted(self.path.glob("*.log"))
        assert disk_bytes(self.journal) == sum(path.stat().st_size for path in files)
        for path in files:
            found = [one.record for one in read_segment(path)]
            active = path == files[-1] and self.journal._active is not None
            assert active or any(one in self.needed for one in found), f"{path} is for nothing"

    def _wrote(self, one: Record) -> None:
        self.written.append(one)
        if one.seq > self.covered.get(one.stream, -1):
            self.needed.append(one)

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()


def test_the_journal_is_a_list_of_what_is_needed(tmp_path: Path):
    machine = type("Machine", (JournalMachine,), {"folder": tmp_path})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )


def test_memory_follows_what_is_needed(tmp_path: Path):
    """Ten thousand records, of which a hundred are needed at a time."""

    def run(journal: Journal, start: int, count: int) -> None:
        for first in range(start, start + count, 100):
            futures = [journal.append(record("s", first + i)) for i in range(100)]
            wait(futures, LIMIT)
            for i in range(100):
                write_of_its_own = f"sampler {first + i}"
                journal.covered(write_of_its_own, 1)
                journal.forget(write_of_its_own)
            journal.covered("s", first + 99)

    tracemalloc.start()
    try:
        with Journal(tmp_path, segment_bytes=100_000, flush=lambda _: None) as journal:
            run(journal, 0, 2_000)
            before = tracemalloc.get_traced_memory()[0]
            run(journal, 2_000, 10_000)
            grown = tracemalloc.get_traced_memory()[0] - before
            assert len(names(tmp_path)) <= 2
    finally:
        tracemalloc.stop()
    assert grown < 100_000
