"""Results: readable again and again until their time is over, also after a restart."""

import errno
import os
import random
import subprocess
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manylora.service.state import result_files as results_module
from manylora.service.state.result_files import Result, Results
from manylora.types import SaveFailed

TTL = 100.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., Results]:
    """Opens the same folder as often as asked."""

    def open_one(memory_bytes: int = 1 << 20) -> Results:
        return Results(tmp_path / "results", TTL, memory_bytes, clock)

    return open_one


def put(results: Results, request_id: str, body: bytes = b"body", owner: str = "ann") -> None:
    results.put(request_id, owner, "application/x-protobuf", body)


def files(results: Results) -> list[Path]:
    return [path for path in results.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_a_result_is_read_as_often_as_one_likes(make: Callable[..., Results], memory_bytes: int):
    results = make(memory_bytes)
    odd = "s:train:1/../../x\0\ud800ü"
    for request_id in ("s:train:1:5", odd, "x" * 10_000):
        put(results, request_id, os.urandom(1000))
        first = results.get(request_id)
        assert first is not None
        assert (first.request_id, first.owner, first.created_at) == (request_id, "ann", 1000.0)
        assert results.get(request_id) == first == make().get(request_id)
    assert results.get("s:train:1:6") is None
    put(results, "empty", b"")
    assert make().get("empty") == Result("empty", "ann", "application/x-protobuf", b"", 1000.0)
    assert len(files(results)) == 4


def test_the_latest_result_of_a_request_counts(make: Callable[..., Results], clock: Clock):
    results = make()
    put(results, "r", b"one")
    clock.now += 90
    put(results, "r", b"two")
    clock.now += 90
    for reader in (results, make()):
        found = reader.get("r")
        assert found is not None and (found.body, found.created_at) == (b"two", 1090.0)


@pytest.mark.parametrize("restart", [False, True])
def test_a_result_goes_when_its_time_is_over(
    make: Callable[..., Results], clock: Clock, restart: bool
):
    results = make()
    put(results, "old")
    clock.now = 1050.0
    put(results, "young")
    if restart:
        results = make()
    clock.now = 1099.9
    assert results.get("old") is not None
    assert results.sweep() == 0
    clock.now = 1100.0
    assert results.get("old") is None and results.recent("old") is None
    assert make().get("old") is None  # before anybody sweeps
    assert results.sweep() == 1 and results.sweep() == 0
    assert len(files(results)) == 1
    assert results.get("young") is not None
    assert results.sweep(now=2000.0) == 1
    assert files(results) == []


def test_memory_keeps_the_latest_and_files_the_rest(make: Callable[..., Results]):
    results = make(memory_bytes=10 * 2000)
    for i in range(30):
        put(results, str(i), bytes([i]) * 1000)
        assert results.get("0") is not None  # used all the time, so it stays
    in_memory = [i for i in range(30) if results.recent(str(i)) is not None]
    assert 0 in in_memory and 29 in in_memory and 8 <= len(in_memory) <= 12
    for i in range(30):
        found = results.get(str(i))
        assert found is not None and found.body == bytes([i]) * 1000
    put(results, "huge", b"x" * 100_000)
    assert results.recent("huge") is None and results.get("huge") is not None


def test_a_damaged_result_is_a_missing_one(
    make: Callable[..., Results], caplog: pytest.LogCaptureFixture
):
    results = make(memory_bytes=0)
    put(results, "r", b"body of a sample")
    (path,) = files(results)
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        assert results.get("r") is None
        path.write_bytes(good[:size] + bytes([good[size] ^ 1]) + good[size + 1 :])
        assert results.get("r") is None
    path.write_bytes(good)
    assert results.get("r") is not None
    assert caplog.messages and "sample" not in caplog.text
    # A file under another's name (somebody renamed it) is not that other's result.
    path.rename(results._path("other"))
    assert results.get("other") is None


def test_what_a_killed_process_left_half_written_goes(make: Callable[..., Results]):
    results = make()
    (results.folder / "partial" / "7").write_bytes(b"half")
    make()
    assert files(results) == []


def test_threads_may_put_and_get(make: Callable[..., Results], clock: Clock):
    results = make(memory_bytes=20_000)
    failures: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        for i in range(150):
            name = f"{number}:{i}"
            put(results, name, name.encode() * 50)
            put(results, "shared", b"x" * rng.randrange(1000))
            asked = f"{number}:{rng.randrange(i + 1)}"
            found = results.get(asked)
            if found is None or found.body != asked.encode() * 50:
                failures.append(asked)
            if results.get("shared") is None:
                failures.append("shared")
            if i % 50 == 0:
                results.flush()
                results.sweep()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(files(results)) == 6 * 150 + 1


def memory_growth(results: Results, count: int) -> int:
    tracemalloc.start()
    try:
        for i in range(count // 4):
            put(results, f"warm {i}", b"x" * 100)
        before = _held_by_results()
        for i in range(count):
            put(results, f"r{i}", b"x" * 100)
            results.get(f"r{i // 2}")
        return _held_by_results() - before
    finally:
        tracemalloc.stop()


def _held_by_results() -> int:
    """Bytes that the module's own lines hold; other threads of the process allocate, too."""
    own = tracemalloc.Filter(True, results_module.__file__)
    traces = tracemalloc.take_snapshot().filter_traces([own]).traces
    return sum(trace.size for trace in traces)


def test_memory_is_flat(make: Callable[..., Results]):
    assert memory_growth(make(memory_bytes=100_000), 1_000) < 50_000


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand(make: Callable[..., Results]):
    assert memory_growth(make(memory_bytes=1_000_000), 100_000) < 300_000


# --- durability ---------------------------------------------------------------------------------


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is flushed, in order; `*` is everything."""
    seen: list[str] = []
    monkeypatch.setattr(results_module, "flush_path", lambda path: seen.append(path.name))
    monkeypatch.setattr(results_module, "_flush_file_system", lambda _: seen.append("*"))
    return seen


def test_a_flush_covers_all_that_was_put(make: Callable[..., Results], flushed: list[str]):
    results = make()
    flushed.clear()
    results.flush()
    assert flushed == []
    put(results, "a")
    put(results, "b")
    results.flush()
    paths = [results._path("a"), results._path("b")]
    assert flushed[:2] == [path.name for path in paths]
    assert set(flushed[2:]) == {path.parent.name for path in paths}
    flushed.clear()
    results.flush()
    assert flushed == []
    for i in range(100):
        put(results, str(i))
    results.flush()
    assert flushed == ["*"]


def test_a_flush_that_failed_is_made_up_for(
    make: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
):
    results = make()
    put(results, "a")
    seen: list[str] = []
    with monkeypatch.context() as patch:

        def fail(_: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(results_module, "flush_path", fail)
        with pytest.raises(SaveFailed, match="Input/output error"):
            results.flush()
    monkeypatch.setattr(results_module, "_flush_file_system", lambda _: seen.append("*"))
    results.flush()
    assert seen == ["*"]


def test_two_who_flush_both_wait(make: Callable[..., Results], monkeypatch: pytest.MonkeyPatch):
    """The second one finds nothing to do, but what it needs is not on the disk yet."""
    results = make()
    put(results, "a")
    begun, go = threading.Event(), threading.Event()

    def slow(_: Path) -> None:
        begun.set()
        assert go.wait(10)

    monkeypatch.setattr(results_module, "flush_path", slow)
    first, second = (threading.Thread(target=results.flush) for _ in range(2))
    first.start()
    assert begun.wait(10)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    go.set()
    first.join(10)
    second.join(10)
    assert not first.is_alive() and not second.is_alive()


def test_really_flushing_works_here(make: Callable[..., Results]):
    results = make()
    for i in range(3):
        put(results, str(i))
    results.flush()
    for i in range(60):
        put(results, str(i))
    results.flush()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """`full[0] = True` fills the disk."""
    state = [False]
    write_bytes = Path.write_bytes

    def write(path: Path, data: Any) -> int:
        if state[0]:
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    return state


def test_on_a_full_disk_memory_still_serves(
    make: Callable[..., Results], full: list[bool], clock: Clock
):
    results = make()
    put(results, "before")
    full[0] = True
    with pytest.raises(SaveFailed, match="No space left"):
        put(results, "during", b"precious")
    found = results.get("during")
    assert found is not None and found.body == b"precious"
    assert results.get("before") is not None
    assert len(files(results)) == 1  # nothing half written is left
    # It is not durable, and nobody may be told that it is.
    with pytest.raises(SaveFailed):
        results.flush()
    assert make().get("during") is None
    full[0] = False
    results.flush()
    assert make().get("during") == found


def test_a_result_that_was_never_written_is_given_up_in_time(
    make: Callable[..., Results], full: list[bool], clock: Clock
):
    results = make(memory_bytes=10_000)
    full[0] = True
    for i in range(50):
        with pytest.raises(SaveFailed):
            put(results, str(i), b"x" * 1000)
    there = [i for i in range(50) if results.get(str(i)) is not None]
    assert there and there[-1] == 49 and len(there) < 10
    clock.now += TTL
    results.flush()  # nobody can ask for them any more
    results.sweep()
    assert results.get("49") is None


def test_a_really_full_disk(tmp_path: Path):
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        clock = Clock()
        results = Results(tmp_path / "results", TTL, 100_000, clock)
        refused = 0
        for i in range(150):
            try:
                put(results, str(i), b"x" * 20_000)
            except SaveFailed:
                refused += 1
            assert results.get(str(i)) is not None
        assert 0 < refused < 150
        clock.now += TTL
        assert results.sweep() == 150 - refused
        put(results, "later", b"x" * 20_000)
        results.flush()
        assert Results(tmp_path / "results", TTL, 0, clock).get("later") is not None
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed):
        Results(tmp_path / "file" / "results", TTL)
