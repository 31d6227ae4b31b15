"""This process starts an engine's processes on one machine, through torch's elastic launcher.

It has imported everything that they need, and forks them: a group that was lost is there again
within a second. It touches no device itself. It ends when its control process does.

Run as `python -m manylora.processes.launch`; the first line of its input is an `Assignment`.
"""

import importlib
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from manylora.processes.commands import Assignment

# A group that is lost this often has its control process to blame, which gives up far earlier.
MOST_RESTARTS = 10_000
# How soon the launcher sees that a process has ended.
MONITOR_SECONDS = 0.05


def main(assignment: Assignment, control: int) -> int:
    """Start the processes and watch them until they are told to stop; return the exit status.

    The descriptor `control` is at its end when the control process is gone.
    """
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    logging.disable(logging.CRITICAL)  # the control process tells what happens
    _import_all(assignment.base)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from manylora.processes import member

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=assignment.num_processes,
        run_id=f"manylora-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MOST_RESTARTS,
        monitor_interval=MONITOR_SECONDS,
        start_method="fork",
    )
    try:
        elastic_launch(config, member.run)(assignment.address, bytes.fromhex(assignment.secret))
    except ChildFailedError as error:
        print(f"the engine's processes failed: {error}", file=sys.stderr)
        return 1
    return 0


def _import_all(base: str) -> None:
    """Import what the processes would, the base's own classes included."""
    import transformers

    import manylora.engine  # noqa: F401
    from manylora.models.base import resolve_base

    config = Path(resolve_base(base)) / "config.json"
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["architectures"][0]
        getattr(transformers, name)
    except (OSError, ValueError, KeyError, IndexError, AttributeError):
        importlib.import_module("transformers.modeling_utils")


def _end_with(control: int) -> None:
    """Wait for the control process's end, then end the process group: this one and its children."""
    while os.read(control, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(Assignment.parse(sys.stdin.buffer.readline()), sys.stdin.fileno()))
