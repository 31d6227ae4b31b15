"""A future of a future is flattened into one."""

from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


def flattened(outer: Future[Future[Result]]) -> Future[Result]:
    """Return a future of what a future of a future brings in the end."""
    flat: Future[Result] = Future()

    def copy(done: Future[Any]) -> None:
        if not flat.set_running_or_notify_cancel():
            return  # cancelled: its client waits no longer
        error = done.exception() if not done.cancelled() else RuntimeError("cancelled")
        if error is not None:
            flat.set_exception(error)
        else:
            flat.set_result(done.result())

    def unwrap(done: Future[Future[Result]]) -> None:
        if done.cancelled() or done.exception() is not None:
            copy(done)
        else:
            done.result().add_done_callback(copy)

    outer.add_done_callback(unwrap)
    return flat
