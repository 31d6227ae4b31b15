"""Runs a function on N ranks: real processes with gloo between them.

One process has everything imported; ranks are forked off it, so each call begins afresh and costs
a fraction of a second. What a rank returns comes back as JSON, arrays in a file beside it. A rank
that fails ends the others and fails the call with its traceback; ranks that hang are ended after
a limit, and the call fails with where each of them stood.
"""

import atexit
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from manylora.types.mesh_shape import MeshShape
from tests.wire.forked import ask, hear

# Seconds until ranks that do not end are taken to hang, and those for the others to fall after one.
LIMIT, GRACE = 60.0, 2.0


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message shows every rank's last words."""


def run_ranks(
    function: Callable[..., Any], shape: str, *arguments: Any, limit: float = LIMIT
) -> list[Any]:
    """Call `function(mesh, *arguments)` on every rank of a mesh.

    Args:
        function: at the top of a module under `tests`.
        shape: such as `dp=2,tp=2`.
        arguments: JSON.
        limit: seconds.

    Returns:
        What each rank returned, in the order of the ranks: JSON with numpy arrays in it.

    Raises:
        RankFailed
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = {
            "function": [function.__module__, function.__qualname__],
            "shape": shape,
            "arguments": arguments,
            "folder": folder,
            "limit": limit,
        }
        _nursery().run(call)
        return [_read(Path(folder), rank) for rank in range(MeshShape.parse(shape).size)]


class _Nursery:
    """The process that ranks are forked off."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.processes", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
        )
        theirs.close()
        atexit.register(self.close)

    def run(self, call: dict[str, Any]) -> None:
        ask(self._socket, call)
        failures = hear(self._socket)[0]
        if failures:
            raise RankFailed("\n\n".join(failures))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(30)


_only: list[_Nursery] = []


def _nursery() -> _Nursery:
    if not _only:
        _only.append(_Nursery())
    return _only[0]


def _nurse(connection: socket.socket) -> None:
    """Fork the ranks of each call, until nobody can ask any more."""
    import torch

    import manylora.engine
    import manylora.parallel  # noqa: F401

    torch.set_num_threads(1)
    while True:
        try:
            call, _ = hear(connection)
        except (EOFError, OSError):
            return
        # Once, rather than in every rank; transformers imports a family when it is first asked for.
        try:
            prepare(call)
            failures = _call(call)
        except Exception:
            failures = [traceback.format_exc()]
        ask(connection, failures)


def prepare(call: dict[str, Any]) -> None:
    """Import what the call's ranks will need."""
    import torch.distributed.fsdp
    from transformers import AutoConfig, AutoModelForCausalLM

    importlib.import_module(call["function"][0])
    for argument in call["arguments"]:
        if isinstance(argument, str) and (Path(argument) / "config.json").is_file():
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(argument))


def _call(call: dict[str, Any]) -> list[str]:
    """Run one call's ranks; the last words of all if one failed."""
    folder, size = Path(call["folder"]), MeshShape.parse(call["shape"]).size
    pids: dict[int, int] = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(call, rank))
        pids[pid] = rank
    running, failed = set(pids), False
    end = time.monotonic() + call["limit"] + GRACE
    while running and time.monotonic() < end:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                if status and not failed:
                    failed, end = True, min(end, time.monotonic() + GRACE)
        time.sleep(0.002)
    hung = bool(running) and not failed
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not failed and not hung:
        return []
    return [
        f"--- rank {rank} of {call['shape']}:\n{(folder / f'{rank}.log').read_text()}"
        for rank in range(size)
    ]


def _rank(call: dict[str, Any], rank: int) -> int:
    """Be a rank; its exit status."""
    folder = Path(call["folder"])
    with (folder / f"{rank}.log").open("w", buffering=1, encoding="utf-8") as log:
        try:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            faulthandler.dump_traceback_later(call["limit"], exit=True, file=log)
            _work(call, rank, folder)
            faulthandler.cancel_dump_traceback_later()
            return 0
        except BaseException:
            _last_words(log)
            return 1


def _last_words(log: IO[str]) -> None:
    sys.stdout.flush()
    log.write(traceback.format_exc())


def _work(call: dict[str, Any], rank: int, folder: Path) -> None:
    import torch.distributed as dist

    from manylora.parallel import Mesh

    shape = MeshShape.parse(call["shape"])
    if shape.size > 1:
        store = dist.FileStore(str(folder / "store"), shape.size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=shape.size)
    module, name = call["function"]
    function = getattr(importlib.import_module(module), name)
    result = function(Mesh.join(shape, "cpu"), *call["arguments"])
    arrays: dict[str, Any] = {}
    text = json.dumps(_without_arrays(result, arrays))
    np.savez(folder / f"{rank}.npz", **arrays)
    (folder / f"{rank}.json").write_text(text)
    if shape.size > 1:
        # Nobody leaves while another still expects an answer.
        dist.barrier()


def _without_arrays(value: Any, arrays: dict[str, Any]) -> Any:
    """`value` with every array put into `arrays` and its key in its place."""
    if isinstance(value, np.ndarray):
        key = str(len(arrays))
        arrays[key] = value
        return {"array": key}
    if isinstance(value, dict):
        return {"dict": {str(key): _without_arrays(one, arrays) for key, one in value.items()}}
    if isinstance(value, list | tuple):
        return [_without_arrays(one, arrays) for one in value]
    return value


def _read(folder: Path, rank: int) -> Any:
    with np.load(folder / f"{rank}.npz", allow_pickle=False) as arrays:
        return _with_arrays(json.loads((folder / f"{rank}.json").read_text()), arrays)


def _with_arrays(value: Any, arrays: Any) -> Any:
    if isinstance(value, dict):
        if "array" in value:
            return arrays[value["array"]]
        return {key: _with_arrays(one, arrays) for key, one in value["dict"].items()}
    if isinstance(value, list):
        return [_with_arrays(one, arrays) for one in value]
    return value


if __name__ == "__main__":
    _nurse(socket.socket(fileno=int(sys.argv[1])))
