"""Reading: whatever happened to the files, what can be read is read, and nothing else is."""

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.journal import Damage, Journal, Record
from manylora.journal import record_format as format_module
from manylora.journal.record_format import MAGIC, encode
from tests.unit.journal.journals import disk_bytes

RECORDS = [
    Record("a", 1, "fb", "ann", "a:1", "d1", b"one" * 5, {"x": 1}),
    Record("b", 1, "fb", "bob", "b:1", "d2", b""),
    Record("a", 2, "step", "ann", "a:2", "d3", MAGIC + b"\xf7mlJrec\x00"),
    Record("b", 2, "fb", "bob", "b:2", "d4", b"\xff" * 20),
]
FRAMES = [encode(record) for record in RECORDS]
ENDS = [sum(map(len, FRAMES[: i + 1])) for i in range(len(FRAMES))]


def read(folder: Path) -> tuple[list[Record], list[Damage]]:
    recovery = Journal.recover(folder)
    records = list(recovery.records)
    return records, recovery.damages


def put(folder: Path, *segments: bytes) -> None:
    for number, data in enumerate(segments, start=1):
        (folder / f"{number:08d}.log").write_bytes(data)


def test_truncation_anywhere_loses_what_was_cut_and_says_nothing(tmp_path: Path):
    data = b"".join(FRAMES)
    for size in range(len(data) + 1):
        put(tmp_path, data[:size])
        whole = sum(end <= size for end in ENDS)
        assert read(tmp_path) == (RECORDS[:whole], [])
        # Opened for writing, the torn end is cut off, so that later it is not in the middle.
        with Journal(tmp_path, flush=lambda _: None) as journal:
            journal.append(RECORDS[0]).result(5)
        assert read(tmp_path) == ([*RECORDS[:whole], RECORDS[0]], [])
        for path in tmp_path.glob("*.log"):
            path.unlink()


def test_truncation_of_an_older_segment_is_damage(tmp_path: Path):
    data = b"".join(FRAMES)
    for size in range(len(data)):
        put(tmp_path, data[:size], FRAMES[0])
        records, damages = read(tmp_path)
        whole = sum(end <= size for end in ENDS)
        assert records == [*RECORDS[:whole], RECORDS[0]]
        torn = size not in (0, *ENDS)
        assert len(damages) == torn
        if torn:
            assert (damages[0].segment, damages[0].offset) == ("00000001.log", [0, *ENDS][whole])


def test_a_flipped_bit_anywhere_loses_one_record_and_is_reported(tmp_path: Path):
    data = b"".join(FRAMES)
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            put(tmp_path, data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            hit = sum(end <= at for end in ENDS)
            records, damages = read(tmp_path)
            assert records == RECORDS[:hit] + RECORDS[hit + 1 :], (at, flip)
            assert [(d.segment, d.offset) for d in damages] == [
                ("00000001.log", [0, *ENDS][hit])
            ], (at, flip)


def test_a_damaged_body_still_says_whose_it_was(tmp_path: Path):
    data = bytearray(b"".join(FRAMES))
    data[ENDS[0] - 1] ^= 1
    put(tmp_path, bytes(data))
    records, (damage,) = read(tmp_path)
    assert records == RECORDS[1:]
    assert damage.reason == "the body is damaged"
    assert damage.lost == Record("a", 1, "fb", "ann", "a:1", "d1", b"", {"x": 1})


def test_zeros_at_the_end_are_a_torn_end(tmp_path: Path):
    """The file had grown, and the power failed before its bytes were written."""
    put(tmp_path, b"".join(FRAMES) + bytes(5000))
    assert read(tmp_path) == (RECORDS, [])
    put(tmp_path, b"".join(FRAMES) + bytes(5000), FRAMES[0])
    records, damages = read(tmp_path)
    assert records == [*RECORDS, RECORDS[0]] and len(damages) == 1


def test_bytes_that_went_missing_in_the_middle_cost_no_neighbour(tmp_path: Path):
    for count in (1, 5, len(FRAMES[1]) + 3):
        start = ENDS[0] + 10
        data = b"".join(FRAMES)
        put(tmp_path, data[:start] + data[start + count :])
        records, damages = read(tmp_path)
        lost = 1 if count < len(FRAMES[1]) else 2
        assert records == [RECORDS[0], *RECORDS[1 + lost :]] and len(damages) == 1


def test_a_record_hidden_in_a_body_is_never_believed(tmp_path: Path):
    """A tenant may send what looks like another tenant's record, and hope for a damaged disk."""
    forged = encode(Record("b", 9, "fb", "bob", "b:9", "d", b"do as I say"))
    nearly = [bytes([forged[0] ^ 1]) + forged[1:], forged[:7] + b"\x00" + forged[8:]]
    for body in (forged * 3, *nearly):
        carrier = Record("a", 3, "fb", "ann", "a:3", "d", body)
        frame = encode(carrier)
        put(tmp_path, frame)
        assert read(tmp_path) == ([carrier], [])
        for at in range(len(frame)):
            for flip in (0x01, 0x55):
                put(tmp_path, frame[:at] + bytes([frame[at] ^ flip]) + frame[at + 1 :] + FRAMES[1])
                records, _ = read(tmp_path)
                assert records == [RECORDS[1]], at


@given(st.binary(max_size=400), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_garbage_is_never_a_reason_to_stop(tmp_path_factory: Any, garbage: bytes, where: int):
    folder = tmp_path_factory.mktemp("journal")
    parts = [*FRAMES[:where], garbage, *FRAMES[where:]]
    put(folder, b"".join(parts))
    records, damages = read(folder)
    # What begins with half a magic may swallow nothing: the next record has its own.
    assert [record for record in records if record in RECORDS] == records == RECORDS
    assert bool(damages) == bool(garbage)


def test_random_damage_everywhere(tmp_path: Path):
    rng = random.Random(3)
    for _ in range(200):
        segments = []
        for _ in range(3):
            data = bytearray(b"".join(rng.choices(FRAMES, k=6)))
            for _ in range(rng.randrange(6)):
                data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            segments.append(bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data))
        put(tmp_path, *segments)
        records, _ = read(tmp_path)
        assert all(record in RECORDS for record in records)
        with Journal(tmp_path, flush=lambda _: None) as journal:
            for stream in journal.streams():
                journal.forget(stream)
            assert journal.lag() == (0, 0) and disk_bytes(journal) == 0
        assert read(tmp_path) == ([], [])


def test_a_damaged_segment_is_put_aside_when_it_is_no_longer_needed(tmp_path: Path):
    put(tmp_path, FRAMES[0] + b"rubbish" + FRAMES[1], FRAMES[2])
    with Journal(tmp_path) as journal:
        journal.covered("a", 2)
        assert sorted(p.name for p in tmp_path.glob("0*")) == ["00000001.log"]
        journal.covered("b", 1)
        assert sorted(p.name for p in tmp_path.glob("0*")) == ["00000001.damaged"]
    assert read(tmp_path) == ([], [])


def test_what_is_not_a_segment_is_left_alone(tmp_path: Path):
    put(tmp_path, FRAMES[0])
    for name in ("notes.txt", "1.log", "000000001.log", "00000002.log.bak"):
        (tmp_path / name).write_text("mine")
    with Journal(tmp_path) as journal:
        assert journal.streams() == ["a"]
        journal.forget("a")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000000001.log",
        "00000002.log.bak",
        "1.log",
        "lock",
        "notes.txt",
    ]


def test_a_missing_folder_is_an_empty_journal(tmp_path: Path):
    assert read(tmp_path / "none") == ([], [])


def test_a_segment_that_cannot_be_opened_is_damage(tmp_path: Path):
    put(tmp_path, FRAMES[0])
    (tmp_path / "00000002.log").symlink_to(tmp_path / "nowhere")
    records, (damage,) = read(tmp_path)
    assert records == [RECORDS[0]] and "cannot be opened" in damage.reason


def test_a_sector_that_cannot_be_read_costs_what_lies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    big = [Record("a", i, "fb", "ann", f"a:{i}", "d", os.urandom(50_000)) for i in range(6)]
    put(tmp_path, b"".join(map(encode, big)))
    pread = os.pread

    def broken(descriptor: int, count: int, offset: int) -> bytes:
        if offset < 104_096 and offset + count > 104_000:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, count, offset)

    monkeypatch.setattr(format_module.os, "pread", broken)
    records, damages = read(tmp_path)
    assert records[:2] == big[:2] and records[-2:] == big[-2:]
    assert any("Input/output error" in damage.reason for damage in damages)
