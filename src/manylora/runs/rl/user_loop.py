"""Somebody's coroutines have an event loop in a thread of their own."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from manylora.runs.rl.user_code import traceback_text
from manylora.runs.rl.user_output import OUTPUT, BoundedLog

# Tasks that are cancelled have so long to clean up.
_GRACE_SECONDS = 1.0


class UserLoop:
    """A `UserLoop` is an event loop in a daemon thread; it survives whatever its tasks raise."""

    def __init__(self, adapter: str, output: BoundedLog, executor: ThreadPoolExecutor):
        """Start the thread.

        Args:
            output: what is printed on it goes there, and what its tasks raised unseen.
            executor: runs what its tasks hand to threads.
        """
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(executor)
        self.loop.set_exception_handler(self._note)
        self._output, self._stopping = output, False
        self._thread = threading.Thread(
            target=self._main, name=f"manylora-hooks-{adapter}", daemon=True
        )
        self._thread.start()

    async def answers(self, seconds: float = _GRACE_SECONDS) -> bool:
        """Return whether the loop turns, or something blocks it."""
        ping = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop)
        try:
            await asyncio.wait_for(asyncio.wrap_future(ping), seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> int:
        """Cancel every task and end the loop; return how many tasks had been left behind."""
        ending = asyncio.run_coroutine_threadsafe(self._cancel_all(), self.loop)
        try:
            left = await asyncio.wait_for(asyncio.wrap_future(ending), 2 * _GRACE_SECONDS)
        except TimeoutError:
            return 0  # something blocks it; the thread is left to itself
        self._stopping = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        await asyncio.to_thread(self._thread.join, _GRACE_SECONDS)
        return left

    async def _cancel_all(self) -> int:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_GRACE_SECONDS)
        await self.loop.shutdown_asyncgens()
        return len(tasks)

    def _main(self) -> None:
        OUTPUT.set(self._output)
        asyncio.set_event_loop(self.loop)
        process = os.getpid()
        while not self._stopping:
            try:
                self.loop.run_forever()
            # A task that raises SystemExit takes its loop along.
            except BaseException as fault:
                if os.getpid() != process:
                    os._exit(1)
                self._write(traceback_text(fault))
        for task in asyncio.all_tasks(self.loop):
            # It does not let itself be cancelled; nobody is to be told so on stderr.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.loop.close()

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        fault = context.get("exception")
        told = "" if fault is None else traceback_text(fault)
        self._write(f"{context['message']}\n{told}")

    def _write(self, text: str) -> None:
        self._output.write(text.encode("utf-8", "backslashreplace"))
