"""A member is one process of an engine: it joins the others, opens its part of the base, and obeys.

It lives as long as its connection to the control process: when that is closed, or its end is gone,
the process ends at once, whatever it is doing.
"""

import faulthandler
import logging
import os
import queue
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from manylora.engine import Engine
from manylora.engine.host_memory import is_exhaustion
from manylora.hosting.engine_protocol import VERBS
from manylora.lora.adapter import Adapter
from manylora.lora.state import AdapterState
from manylora.parallel import Mesh
from manylora.processes.code import code_digest
from manylora.processes.commands import BY_RAY, About, Hello, Vectors, unpacked
from manylora.processes.connection import Connection
from manylora.types import ManyloraError, Opening, Sample, SampleResult
from manylora.types.mesh_shape import MeshShape

# Exit statuses: the control process is gone; a command took too long is faulthandler's own, 1.
CONTROL_GONE = 3
CONNECT_SECONDS = 30.0
# How long processes that are all there may take to find each other.
JOIN_SECONDS = 120.0


def run(address: str, secret: bytes) -> None:
    """Serve one control process until it says `stop`.

    The environment says which process of how many this is, as torch's launcher sets it.
    """
    logging.disable(logging.NOTSET)  # the launcher keeps silent, and this was forked off it
    # So was its handler, which raises: a command would fail where its process has to be gone.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection = Connection.made(address, secret, CONNECT_SECONDS)
    faulthandler.enable(connection.fileno())  # a fault of its own is told from a kill
    serve(connection)


def serve(
    connection: Connection, gone: Callable[[], None] = lambda: os._exit(CONTROL_GONE)
) -> None:
    """Serve the control process at the other end of a connection until it says `stop`; call `gone`
    when it goes before."""
    connection.send(
        Hello(
            world_rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            generation=_generation(),
            host=socket.gethostname(),
            pid=os.getpid(),
            code=code_digest(),
        )
    )
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, commands, gone), daemon=True).start()
    member = Member(connection.fileno())
    while (command := commands.get())["verb"] != "stop":
        reply = member.obey(command)
        try:
            connection.send(reply)
        except TypeError:
            connection.send({"fault": traceback.format_exc()})


class Member:
    """A member is a process's part of an engine; it obeys verbs of `EngineProtocol`, and `open`."""

    def __init__(self, stacks: int) -> None:
        """Write to the descriptor `stacks` where this process stands, if it takes too long."""
        self._engine: Engine | None = None
        self._stacks = stacks
        self._samples: dict[int, Sample] = {}

    def obey(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Run a command; return its value, a refusal (an error raised on purpose), or a fault (the
        words of any other). If it takes too long, write down where this process stands, and end it.
        """
        verb, arguments = command["verb"], command["arguments"]
        if self._engine is not None:
            faulthandler.dump_traceback_later(command["seconds"], exit=True, file=self._stacks)
        try:
            if verb == "open":
                return {"value": self._open(*arguments)}
            assert verb in VERBS, f"no verb {verb!r}"
            method: Callable[..., Any] = getattr(self, verb, None) or getattr(self.engine, verb)
            return {"value": _sent(method(*unpacked(arguments, self.engine.sites)))}
        except ManyloraError as error:
            return {"refusal": error}
        except Exception as error:
            return {"fault": traceback.format_exc(), "exhausted": is_exhaustion(error)}
        finally:
            faulthandler.cancel_dump_traceback_later()

    @property
    def engine(self) -> Engine:
        """This is the engine, once it is open."""
        assert self._engine is not None, "a command before `open`"
        return self._engine

    def _open(self, opening: Opening) -> About:
        """Join the other processes, and open this one's part of the base."""
        device = _device(opening.device)
        own = replace(opening, device=device, threads=opening.threads or _own_threads(opening.mesh))
        self._engine = Engine(own, self._joined(opening.mesh.one, device))
        base, free = self._engine.base, self._engine.free_bytes
        if base.device.type == "cpu":
            free //= _processes_here(opening.mesh)
        known = (base.name, base.folder, base.fingerprint)
        return About(*known, base.context_length, base.vocab_size, self._engine.sites, free)

    def _joined(self, shape: MeshShape, device: str) -> Mesh:
        """Return this process's place in its replica's mesh, once all its processes are there."""
        if shape.size > 1:
            on_gpu = device.startswith("cuda")
            if on_gpu:
                torch.cuda.set_device(device)
            faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True, file=self._stacks)
            store, world_rank, _ = next(dist.rendezvous("env://"))
            replica, rank = divmod(world_rank, shape.size)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                # The launcher's store outlives a generation, and with it the addresses of the dead.
                store=dist.PrefixStore(f"generation-{_generation()}/{replica}", store),
                rank=rank,
                world_size=shape.size,
                # How long a command may take is the control process's to say; it ends them all.
                timeout=timedelta(days=1),
            )
            faulthandler.cancel_dump_traceback_later()
        return Mesh.join(shape, device if device != "auto" else "cpu")

    # Verbs whose arguments or results travel in another form: samples go by numbers.

    def admit(self, first: int, samples: Sequence[Sample]) -> list[ManyloraError | None]:
        """See `Engine.admit`; requests are numbered from `first` on."""
        verdicts = self.engine.admit(samples)
        for number, (sample, error) in enumerate(zip(samples, verdicts, strict=True), first):
            if error is None:
                self._samples[number] = sample
        return verdicts

    def decode(self, seconds: float) -> list[tuple[int, SampleResult | ManyloraError]]:
        """See `Engine.decode`."""
        numbers = {id(sample): number for number, sample in self._samples.items()}
        found = [(numbers[id(s)], outcome) for s, outcome in self.engine.decode(seconds)]
        for number, _ in found:
            del self._samples[number]
        return found

    def cancel(self, number: int) -> None:
        """See `Engine.cancel`."""
        self.engine.cancel(self._samples.pop(number))

    def interrupt(self, number: int) -> None:
        """See `Engine.interrupt`."""
        self.engine.interrupt(self._samples[number])


def _sent(value: Any) -> Any:
    """Return a verb's result as it travels: control knows an adapter's settings and layout."""
    if isinstance(value, AdapterState):
        return Vectors.of(value)
    return None if isinstance(value, Adapter) else value


def _own_threads(shape: MeshShape) -> int | None:
    """Return this process's share of the machine's cores, if there are several; None = torch's
    choice, which goes by what Ray has given it."""
    if shape.size == 1 or BY_RAY in os.environ:
        return None
    return max(1, (os.cpu_count() or 1) // _processes_here(shape))


def _processes_here(shape: MeshShape) -> int:
    """Return how many processes of the engine are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(shape.size)))


def _generation() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _device(asked: str) -> str:
    """Return this process's own device, if there is one for each."""
    if (asked == "auto" and torch.cuda.is_available()) or asked == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return asked


def _listen(
    connection: Connection, commands: "queue.SimpleQueue[dict[str, Any]]", gone: Callable[[], None]
) -> None:
    try:
        while True:
            command = connection.receive()
            commands.put(command)
            if command["verb"] == "stop":
                return
    except (EOFError, OSError, ValueError):
        gone()
        commands.put({"verb": "stop"})
