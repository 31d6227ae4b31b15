"""Somebody's functions run beside the run, so that none of them can stop it.

Functions run in daemon threads, a few for each adapter: one that never returns is left behind, and
the process does not wait for it when it ends. Coroutines run on an event loop in a thread of its
own, which is given up for another one when something blocks it. Whatever they raise, SystemExit
too, is an error of the call, and a child process that returns out of a call ends there.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from manylora.runs.rl.interpreter_watch import WATCH, InterpreterWatch, Warn
from manylora.runs.rl.user_code import last_lines, traceback_text
from manylora.runs.rl.user_loop import UserLoop
from manylora.runs.rl.user_output import (
    OUTPUT,
    BoundedLog,
    divide_output,
    join_output,
    keep_divided,
)
from manylora.types import ManyloraError, RewardError, RolloutFailed

log = logging.getLogger(__name__)

# Rewards that wait for a judge or a sandbox wait at the same time.
_MOST_THREADS = 32
# Calls that never came back; with as many, something is wrong with all of them.
_MOST_HANGING = 64

Result = TypeVar("Result")
Words = ParamSpec("Words")


@dataclass(eq=False, slots=True)
class _Work:
    """A `_Work` is a call that a thread is to make."""

    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    abandoned: bool = False


class UserThreads:
    """`UserThreads` are what one adapter's functions and coroutines run in.

    Nothing is started before the first call. `close` must be called in the end.
    """

    def __init__(
        self,
        adapter: str,
        log_file: Path | None = None,
        *,
        warn: Warn = log.warning,
        most_threads: int = _MOST_THREADS,
        watch: InterpreterWatch = WATCH,
    ):
        """Choose where they write.

        Args:
            log_file: what they print goes there, at most a mebibyte of it; None = nowhere.
            warn: told of what holds the interpreter, and of tasks that were left behind.
            most_threads: functions that run at the same time.
        """
        self.adapter = adapter
        self._output, self._warn, self._watch = BoundedLog(log_file), warn, watch
        self._most_threads = most_threads
        self._lock = threading.Lock()
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads = self._hanging = 0
        self._loop: UserLoop | None = None
        self._divided = self._closed = False

    async def call(
        self,
        what: str,
        function: Callable[[], Result],
        *,
        error: type[ManyloraError] = RewardError,
        timeout: float | None = None,
    ) -> Result:
        """Call a function in a thread, and wait for it without blocking.

        Args:
            what: what messages call it, with its file.
            error: what to raise.
            timeout: seconds after which it is left to itself; None = never.

        Raises:
            ManyloraError: of the type `error`: it raised, or took too long.
        """
        self._begin(what, error)
        work = _Work(lambda: self._guarded(what, function, error))
        self._submit(work)
        try:
            result: Result = await asyncio.wait_for(asyncio.wrap_future(work.future), timeout)
        except TimeoutError:
            self._abandon(work)
            raise error(_too_long(what, timeout)) from None
        except asyncio.CancelledError:
            self._abandon(work)
            raise
        return result

    async def play(
        self,
        what: str,
        function: Callable[[], Awaitable[Result]],
        *,
        error: type[ManyloraError] = RolloutFailed,
        timeout: float | None = None,
    ) -> Result:
        """Await a coroutine on the loop of somebody's code; as `call` in everything else."""
        self._begin(what, error)
        loop = self._running_loop()
        future = asyncio.run_coroutine_threadsafe(
            self._guarded_coroutine(what, function, error), loop.loop
        )
        try:
            result: Result = await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        except TimeoutError:
            if not await loop.answers():
                self._give_up(loop)
            raise error(_too_long(what, timeout)) from None
        return result

    async def close(self) -> None:
        """Cancel what still runs, let the threads go, and give stdout and stderr back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for _ in range(self._threads):
                self._queue.put(None)
            loop, self._loop = self._loop, None
        if loop is not None:
            left = await loop.close()
            if left:
                self._warn(
                    f"adapter {self.adapter}: {left} tasks that its functions began and did not "
                    "wait for were cancelled"
                )
        if self._divided:
            join_output()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function in one of the threads; for `asyncio.to_thread` of somebody's code."""
        work = _Work(function)
        self._submit(work)
        return work.future

    # -- threads ------------------------------------------------------------------------------

    def _begin(self, what: str, error: type[ManyloraError]) -> None:
        if self._closed:
            raise error(f"{what} was called after its adapter had ended")
        if self._hanging >= _MOST_HANGING:
            raise error(
                f"{what} is not called any more: {self._hanging} calls of functions of adapter "
                f"{self.adapter} never came back"
            )
        if not self._divided:
            self._divided = True
            divide_output()
        keep_divided()

    def _submit(self, work: _Work) -> None:
        with self._lock:
            self._queue.put(work)
            if self._idle.acquire(blocking=False) or self._threads >= self._most_threads:
                return
            self._threads += 1
        threading.Thread(
            target=self._work, name=f"manylora-user-{self.adapter}", daemon=True
        ).start()

    def _work(self) -> None:
        OUTPUT.set(self._output)
        while (work := self._next()) is not None:
            if not work.future.set_running_or_notify_cancel():
                continue
            _settle(work)
            with self._lock:
                if work.abandoned:
                    self._hanging -= 1
                    return  # another thread has its place

    def _next(self) -> _Work | None:
        try:
            return self._queue.get_nowait()
        except Empty:
            self._idle.release()
            return self._queue.get()

    def _abandon(self, work: _Work) -> None:
        with self._lock:
            if work.future.running():
                work.abandoned = True
                self._threads -= 1
                self._hanging += 1

    def _guarded(
        self, what: str, function: Callable[[], Result], error: type[ManyloraError]
    ) -> Result:
        process, call = os.getpid(), self._watch.enter(what, self._warn)
        try:
            result = function()
        # Not even SystemExit may end more than this call.
        except BaseException as fault:
            _end_child(process)
            raise self._error(what, fault, error) from None
        finally:
            _end_child(process)
            self._watch.leave(call)
        return result

    # -- coroutines ---------------------------------------------------------------------------

    def _running_loop(self) -> UserLoop:
        with self._lock:
            if self._loop is None:
                self._loop = UserLoop(self.adapter, self._output, _DaemonExecutor(self))
            return self._loop

    def _give_up(self, loop: UserLoop) -> None:
        with self._lock:
            if self._loop is loop:
                self._loop = None
                self._hanging += 1

    async def _guarded_coroutine(
        self, what: str, function: Callable[[], Awaitable[Result]], error: type[ManyloraError]
    ) -> Result:
        OUTPUT.set(self._output)
        process, call = os.getpid(), self._watch.enter(what, self._warn)
        try:
            return await function()
        except (asyncio.CancelledError, GeneratorExit) as fault:
            _end_child(process)
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._error(what, fault, error) from None
        except BaseException as fault:
            _end_child(process)
            raise self._error(what, fault, error) from None
        finally:
            _end_child(process)
            self._watch.leave(call)

    def _error(self, what: str, fault: BaseException, error: type[ManyloraError]) -> ManyloraError:
        whole = traceback_text(fault)
        self._output.write(f"{what} raised\n{whole}".encode("utf-8", "backslashreplace"))
        if isinstance(fault, error):
            return error(f"{what}: {fault}")
        return error(f"{what} raised {type(fault).__name__}:\n{last_lines(fault)}")


class _DaemonExecutor(ThreadPoolExecutor):
    """A `_DaemonExecutor` is one whose threads nobody waits for at the process's end."""

    def __init__(self, threads: UserThreads):
        super().__init__(max_workers=1)
        self._ours = threads

    def submit(
        self, fn: Callable[Words, Result], /, *args: Words.args, **kwargs: Words.kwargs
    ) -> Future[Result]:
        return self._ours.submit(lambda: fn(*args, **kwargs))


def _settle(work: _Work) -> None:
    process = os.getpid()
    try:
        result = work.function()
    except BaseException as fault:
        _end_child(process)
        work.future.set_exception(fault)
    else:
        _end_child(process)
        work.future.set_result(result)


def _end_child(process: int) -> None:
    """End a child process that has come back out of somebody's function: it is not the run."""
    if os.getpid() != process:
        os._exit(0)


def _too_long(what: str, timeout: float | None) -> str:
    return f"{what} took longer than the {timeout:.3g} s that were left of timeout_seconds"
