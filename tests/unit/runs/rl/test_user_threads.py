"""Whatever users' code does stays with its own call: the process and its loop go on."""

import asyncio
import contextlib
import ctypes
import io
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest

from manylora.runs.rl.interpreter_watch import InterpreterWatch
from manylora.runs.rl.user_output import BoundedLog
from manylora.runs.rl.user_threads import UserThreads
from manylora.types import RewardError, RolloutFailed
from tests.unit.runs.rl.fakes import on_threads

PROGRAM_SECONDS = 120


def call(function, **others):
    return on_threads(lambda threads: threads.call("reward r.py:f", function, timeout=60), **others)


def test_what_a_function_returns_comes_back():
    assert call(lambda: 3) == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ValueError("no such colour"), "ValueError: no such colour"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_whatever_is_raised_is_an_error_of_that_call(fault, told, asynchronous, tmp_path):
    def raises():
        raise fault

    async def raises_later():
        await asyncio.sleep(0)
        raise fault

    async def play(threads):
        run, function = (threads.play, raises_later) if asynchronous else (threads.call, raises)
        with pytest.raises(RewardError) as caught:
            await run("reward r.py:f", function, error=RewardError, timeout=60)
        # And the next one finds everything as it was.
        later = asyncio.sleep(0, 5) if asynchronous else 5
        assert await run("reward r.py:f", lambda: later, error=RewardError, timeout=60) == 5
        return str(caught.value)

    message = on_threads(play, tmp_path / "user.log")
    assert message.startswith("reward r.py:f raised ") and told in message
    assert "in raises" in message
    assert told in (tmp_path / "user.log").read_text()


def test_a_task_that_raises_system_exit_does_not_take_the_loop_along(tmp_path):
    async def exits():
        raise SystemExit(4)

    async def hook():
        task = asyncio.create_task(exits())
        await asyncio.sleep(0.05)
        del task
        return "goes on"

    async def play(threads):
        first = await threads.play("hook", hook, timeout=60)
        return first, await threads.play("hook", hook, timeout=60)

    assert on_threads(play, tmp_path / "user.log") == ("goes on", "goes on")
    assert "SystemExit: 4" in (tmp_path / "user.log").read_text()


def test_one_that_hangs_is_left_behind_and_others_go_on():
    release = threading.Event()

    async def play(threads: UserThreads):
        for _ in range(3):
            with pytest.raises(
                RewardError, match=r"longer than the 0\.05 s that were left of time"
            ):
                await threads.call("reward", release.wait, timeout=0.05)
        return await threads.call("reward", lambda: 7, timeout=60)

    try:
        # As many threads as hang: each is replaced.
        assert on_threads(play, most_threads=1) == 7
    finally:
        release.set()


def test_when_too_many_never_came_back_it_is_said(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr("manylora.runs.rl.user_threads._MOST_HANGING", 2)

    async def play(threads: UserThreads):
        for _ in range(2):
            with pytest.raises(RewardError, match="longer"):
                await threads.call("reward", release.wait, timeout=0.05)
        with pytest.raises(RewardError, match="2 calls of functions of adapter digits never came"):
            await threads.call("reward", lambda: 7, timeout=60)

    try:
        on_threads(play)
    finally:
        release.set()


def test_functions_wait_at_the_same_time():
    both = threading.Barrier(2, timeout=60)

    async def play(threads: UserThreads):
        return await asyncio.gather(*(threads.call("r", both.wait, timeout=60) for _ in range(2)))

    assert sorted(on_threads(play)) == [0, 1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_blocking_code_never_blocks_the_run(asynchronous):
    """The run's loop lets the blocked function go: were it blocked too, nobody would."""
    release = threading.Event()

    async def blocks():
        return release.wait(60)

    async def play(threads: UserThreads):
        if asynchronous:
            running = asyncio.ensure_future(threads.play("hook", blocks, timeout=60))
        else:
            running = asyncio.ensure_future(threads.call("r", lambda: release.wait(60)))
        await asyncio.sleep(0.05)
        release.set()
        return await running

    assert on_threads(play) is True


def test_a_coroutine_that_blocks_its_loop_is_given_another_one():
    release = threading.Event()

    async def blocks():
        release.wait(120)

    async def fine():
        return threading.current_thread().name

    async def play(threads: UserThreads):
        with pytest.raises(RolloutFailed, match="took longer than"):
            await threads.play("hook", blocks, timeout=0.05)
        return await threads.play("hook", fine, timeout=60)

    try:
        assert on_threads(play) == "manylora-hooks-digits"
    finally:
        release.set()


def test_a_coroutine_is_cancelled_when_its_time_is_over():
    cleaned = threading.Event()

    async def hangs():
        try:
            await asyncio.sleep(1000)
        finally:
            cleaned.set()

    async def play(threads: UserThreads):
        with pytest.raises(RolloutFailed, match="took longer than"):
            await threads.play("hook", hangs, timeout=0.05)
        assert await asyncio.to_thread(cleaned.wait, 60)

    on_threads(play)


def test_leaked_tasks_are_cancelled_at_the_end_and_said():
    cancelled, told, kept = [], [], []

    async def lives_on():
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def leaks():
        kept.extend(asyncio.create_task(lives_on()) for _ in range(3))
        await asyncio.sleep(0)
        return 1

    assert (
        on_threads(lambda threads: threads.play("hook", leaks, timeout=60), warn=told.append) == 1
    )
    assert cancelled == [True] * 3
    assert told == [
        "adapter digits: 3 tasks that its functions began and did not wait for were cancelled"
    ]


def test_a_task_that_does_not_let_itself_be_cancelled_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("manylora.runs.rl.user_loop._GRACE_SECONDS", 0.05)
    kept = []

    async def stays():
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async def leaks():
        kept.append(asyncio.create_task(stays()))

    on_threads(lambda threads: threads.play("hook", leaks, timeout=60), warn=lambda _: None)


def forks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:
        return "the child came back"
    os.waitpid(child, 0)
    return "parent"


def forks_and_raises():
    if forks() != "parent":
        raise ValueError("in the child")
    return "parent"


@pytest.mark.parametrize("function", [forks, forks_and_raises])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_child_that_comes_back_out_of_a_function_ends_there(function, asynchronous, tmp_path):
    async def hook():
        return function()

    async def play(threads: UserThreads):
        if asynchronous:
            return await threads.play("hook", hook, timeout=60)
        return await threads.call("reward", function, timeout=60)

    process = os.getpid()
    assert on_threads(play, tmp_path / "user.log") == "parent"
    (tmp_path / f"{os.getpid()}").touch()
    assert os.getpid() == process
    assert [path.name for path in tmp_path.iterdir()] == [str(process)]


# -- what is printed --------------------------------------------------------------------------


def test_a_megabyte_goes_to_a_bounded_file_and_not_to_the_terminal(tmp_path, capsys):
    log = tmp_path / "digits" / "user.log"

    def prints():
        for number in range(3000):
            print(f"{number:6d}" + "x" * 1000)
        print("to stderr", file=sys.stderr)
        sys.stdout.buffer.write(b"raw\n")
        sys.stdout.writelines(["the last line\n"])
        sys.stdout.flush()
        return sys.stdout.isatty()

    async def play(threads: UserThreads):
        print("ours")
        return await threads.call("reward", prints, timeout=60)

    before = sys.stdout, sys.stderr
    assert on_threads(play, log) is False
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("ours\n", "")
    kept = log.read_text()
    assert len(kept) <= 1 << 20
    assert kept.startswith("[what stood here was left out]\n")
    assert kept.endswith("to stderr\nraw\nthe last line\n") and "  2999xxx" in kept


def test_what_a_coroutine_and_its_threads_print_goes_there_too(tmp_path, capsys):
    async def speaks():
        print("child task")

    async def hook():
        print("hook")
        await asyncio.create_task(speaks())
        await asyncio.to_thread(print, "thread")

    async def play(threads: UserThreads):
        running = asyncio.ensure_future(threads.play("hook", hook, timeout=60))
        await asyncio.sleep(0)
        print("ours")
        await running

    on_threads(play, tmp_path / "user.log")
    assert (tmp_path / "user.log").read_text() == "hook\nchild task\nthread\n"
    assert capsys.readouterr() == ("ours\n", "")


def test_streams_that_somebody_puts_in_place_meanwhile_are_divided_too(tmp_path):
    """As a live view does: it puts its own stream in place, and takes it back when it likes."""
    file = io.StringIO()

    async def play(threads: UserThreads):
        await threads.call("reward", lambda: print("one"), timeout=60)
        with contextlib.redirect_stdout(file):
            await threads.call("reward", lambda: print("two"), timeout=60)
            print("ours")
        await threads.call("reward", lambda: print("three"), timeout=60)

    before = sys.stdout
    on_threads(play, tmp_path / "user.log")
    assert sys.stdout is before
    assert file.getvalue() == "ours\n"
    assert (tmp_path / "user.log").read_text() == "one\ntwo\nthree\n"


def test_two_adapters_have_files_of_their_own(tmp_path):
    async def play():
        both = [UserThreads(name, tmp_path / name) for name in "ab"]
        before = sys.stdout
        for threads in both:
            await threads.call("r", lambda name=threads.adapter: print(name), timeout=60)
        await both[0].close()
        assert sys.stdout is not before
        await both[1].close()
        await both[1].close()

    before = sys.stdout
    asyncio.run(play())
    assert sys.stdout is before
    assert [(tmp_path / name).read_text() for name in "ab"] == ["a\n", "b\n"]


def test_the_newest_of_a_log_is_kept(tmp_path):
    log = BoundedLog(tmp_path / "log", most_bytes=100)
    for number in range(50):
        log.write(b"%04d\n" % number)
        assert (tmp_path / "log").stat().st_size <= 100
    assert (tmp_path / "log").read_bytes().endswith(b"0048\n0049\n")
    log.write(b"y" * 1000)
    assert (tmp_path / "log").stat().st_size <= 100
    BoundedLog(None).write(b"nowhere")


# -- the interpreter --------------------------------------------------------------------------


@pytest.mark.parametrize("computes", [False, True])
def test_what_holds_the_interpreter_is_named(computes):
    told: list[str] = []
    noticed, release = threading.Event(), threading.Event()

    def warn(message):
        told.append(message)
        noticed.set()

    def holds():
        library = ctypes.PyDLL(None)  # keeps the interpreter while it is in C
        if computes:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                sum(range(1000))
        library.usleep(1_000_000)

    async def play(threads: UserThreads):
        waits = asyncio.ensure_future(threads.call("r.py:waits", release.wait, timeout=120))
        await threads.call("r.py:holds", holds, timeout=120)
        assert await asyncio.to_thread(noticed.wait, 60)
        release.set()
        await waits

    on_threads(play, warn=warn, watch=InterpreterWatch(held_seconds=0.5))
    assert "r.py:holds" in told[0] and "held the interpreter for" in told[0]
    assert "such work belongs into a process of its own" in told[0]


# -- the process ------------------------------------------------------------------------------


def test_the_process_ends_whatever_hangs():
    program = """
import asyncio, threading, time
from manylora.runs.rl.user_threads import UserThreads
from manylora.types import ManyloraError

async def hook():
    await asyncio.to_thread(time.sleep, 10_000)

async def blocks():
    time.sleep(10_000)

async def main():
    threads = UserThreads("digits")
    for run, what in (
        (threads.call, lambda: time.sleep(10_000)), (threads.play, hook), (threads.play, blocks)
    ):
        try:
            await run("it", what, timeout=0.05)
        except ManyloraError as error:
            print(type(error).__name__)
    await threads.close()

asyncio.run(main())
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PROGRAM_SECONDS
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["RewardError", "RolloutFailed", "RolloutFailed", "ended"]
