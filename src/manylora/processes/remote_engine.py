"""A remote engine is in other processes: it sends each verb to every one of them.

Every process is sent every command, in one order; the leader's answer is the answer. A process that
goes, or an answer that is not the others', is the end of the whole group: what it held is lost, and
every verb raises `EngineLost` from then on.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from manylora.lora.layout import Layout, plan_layout
from manylora.lora.sites import resolve_targets
from manylora.lora.state import AdapterState
from manylora.processes.commands import About, Vectors, packed
from manylora.processes.connection import Connection, Ended, answers, laid_out
from manylora.types import (
    AdapterExists,
    AdapterNotFound,
    AdapterSpec,
    EngineLost,
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    OptimStep,
    OptimStepResult,
    Sample,
    SampleResult,
)
from manylora.types.data import Array
from manylora.types.machine import oom_kills
from manylora.types.memory import WEIGHT_BYTES, adapter_bytes

log = logging.getLogger("manylora.processes")

_CLOSED = "the engine is closed"
# A process that takes too long ends itself, and says where it stood. One that cannot even do that
# is waited for so much longer.
GRACE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RemoteAdapter:
    """A `RemoteAdapter` is an adapter, or a frozen copy, that the engine's processes hold."""

    spec: AdapterSpec
    layout: Layout

    @property
    def num_bytes(self) -> int:
        """Its weights, as the layers read them, take so many bytes."""
        return self.layout.num_params * WEIGHT_BYTES[self.spec.dtype]


class RemoteEngine:
    """A remote engine is an `EngineProtocol` elsewhere; any thread may call verbs, one at a time.

    Attributes:
        base: the base that is open.
        sites: where adapters can act.
        adapters: those that the processes hold, by name.
        snapshots: those that the processes hold, by name.
        lost: why the processes are gone; None while they are there.
        stacks: where those stood that took too long or broke down; empty if none did.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        about: About,
        *,
        step_seconds: float,
        on_lost: Callable[[str], None] = lambda reason: None,
    ):
        """Speak to processes that have opened their base.

        Args:
            connections: by world rank.
            step_seconds: a command that takes longer is taken for hung.
            on_lost: told why, once.
        """
        self.base, self.sites = about, about.sites
        self.adapters: dict[str, RemoteAdapter] = {}
        self.snapshots: dict[str, RemoteAdapter] = {}
        self.lost: str | None = None
        self.stacks = ""
        self._connections = list(connections)
        self._step_seconds = step_seconds
        self._on_lost = on_lost
        self._oom_kills = oom_kills()
        self._lock = threading.Lock()
        self._samples: dict[int, Sample] = {}
        self._next_sample = 0

    @property
    def free_bytes(self) -> int:
        """So many bytes of a device could be taken when the base had been opened."""
        return self.base.free_bytes

    @property
    def room_bytes(self) -> int:
        """More adapters could take so many bytes, of all processes together.

        That is what was free when the base had been opened, less what the adapters that are there
        take once they have stepped.
        """
        held = sum(
            adapter_bytes(one.layout.num_params, one.spec.dtype) for one in self.adapters.values()
        )
        frozen = sum(one.num_bytes for one in self.snapshots.values())
        return self.base.free_bytes * len(self._connections) - held - frozen

    @cached_property
    def tokenizer(self) -> Any:
        """This is the base's tokenizer; None if its folder has none."""
        # Here, because it brings torch with it; only runs that the server itself trains need it.
        from manylora.models.tokenizer import open_tokenizer

        return open_tokenizer(self.base.folder)

    # -- adapters -------------------------------------------------------------------------------

    def create(self, name: str, spec: AdapterSpec) -> RemoteAdapter:
        """Make a new adapter that changes nothing yet. Raises AdapterExists, TargetError."""
        self._refuse_known(name)
        resident = RemoteAdapter(spec, plan_layout(spec, resolve_targets(spec, self.sites)))
        self._call("create", name, spec)
        self.adapters[name] = resident
        return resident

    def restore(self, name: str, state: AdapterState) -> RemoteAdapter:
        """Make an adapter with the given state. Raises AdapterExists."""
        self._refuse_known(name)
        self._call("restore", name, state)
        self.adapters[name] = RemoteAdapter(state.spec, state.layout)
        return self.adapters[name]

    def unload(self, name: str) -> None:
        """Forget an adapter; its snapshots stay."""
        self._resident(name)
        self._call("unload", name)
        del self.adapters[name]

    def poison(self, name: str, reason: str) -> None:
        """Have the adapter's next optimizer step refused."""
        self._resident(name)
        self._call("poison", name, reason)

    def state(self, name: str) -> AdapterState:
        """Return a copy of everything that training the adapter needs."""
        resident = self._resident(name)
        vectors: Vectors = self._call("state", name)
        return vectors.state(resident.spec, resident.layout)

    def base_weight(self, site: str) -> Array:
        """Return the frozen weight fp32 [N, K] of a linear layer."""
        return self._call("base_weight", site)

    def snapshot(self, name: str, snapshot: str) -> None:
        """Freeze a copy of the adapter's weights under the name `snapshot`."""
        resident = self._resident(name)
        self._call("snapshot", name, snapshot)
        self.snapshots[snapshot] = resident

    def snapshot_state(self, snapshot: str) -> AdapterState:
        """Return a snapshot as a state (fp32), for keeping it elsewhere."""
        resident = self.snapshots[snapshot]
        vectors: Vectors = self._call("snapshot_state", snapshot)
        return vectors.state(resident.spec, resident.layout)

    def install_snapshot(self, snapshot: str, state: AdapterState) -> None:
        """Bring a snapshot back that `snapshot_state` gave."""
        self._call("install_snapshot", snapshot, state)
        self.snapshots[snapshot] = RemoteAdapter(state.spec, state.layout)

    def drop_snapshot(self, snapshot: str) -> None:
        """Forget a snapshot."""
        if self.snapshots.pop(snapshot, None) is not None:
            self._call("drop_snapshot", snapshot)

    # -- training -------------------------------------------------------------------------------

    def forward_backward(
        self, works: Sequence[ForwardBackward]
    ) -> list[ForwardBackwardResult | ManyloraError]:
        """See `Engine.forward_backward`."""
        return self._call("forward_backward", list(works))

    def optim_step(self, steps: Sequence[OptimStep]) -> list[OptimStepResult | ManyloraError]:
        """See `Engine.optim_step`."""
        return self._call("optim_step", list(steps))

    # -- sampling -------------------------------------------------------------------------------

    @property
    def decoding(self) -> int:
        """So many sampling requests are not finished."""
        return len(self._samples)

    def admit(self, samples: Sequence[Sample]) -> list[ManyloraError | None]:
        """Let sampling requests join the decode loop."""
        numbers = range(self._next_sample, self._next_sample + len(samples))
        self._next_sample += len(samples)
        verdicts: list[ManyloraError | None] = self._call("admit", numbers.start, list(samples))
        for number, sample, error in zip(numbers, samples, verdicts, strict=True):
            if error is None:
                self._samples[number] = sample
        return verdicts

    def decode(self, seconds: float) -> list[tuple[Sample, SampleResult | ManyloraError]]:
        """Turn the decode loop for a while; return the requests that are finished."""
        finished = self._call("decode", seconds)
        return [(self._samples.pop(number), outcome) for number, outcome in finished]

    def cancel(self, sample: Sample) -> None:
        """Drop a sampling request, if it is still decoding."""
        for number, open_one in self._samples.items():
            if open_one is sample:
                del self._samples[number]
                self._call("cancel", number)
                return

    def interrupt(self, sample: Sample) -> None:
        """End a sampling request, if it is still decoding; `decode` gives what it has."""
        for number, open_one in self._samples.items():
            if open_one is sample:
                self._call("interrupt", number)
                return

    # -- inside ---------------------------------------------------------------------------------

    @property
    def was_lost(self) -> bool:
        """It tells whether the processes went before they were told to."""
        return self.lost is not None and self.lost != _CLOSED

    def lose(self, reason: str) -> None:
        """Give the processes up, because others have to be replaced that were started with them.

        Any thread may call it; one that waits for an answer gets EngineLost.
        """
        self.lost = reason
        for connection in self._connections:
            connection.hang_up()

    def close(self) -> None:
        """Let the processes end."""
        with self._lock:
            if self.lost is None:
                self.lost = _CLOSED
                for connection in self._connections:
                    try:
                        connection.send({"verb": "stop"})
                    except OSError:
                        log.debug("a process of the engine was gone already")
            for connection in self._connections:
                connection.close()

    def _call(self, verb: str, *arguments: Any) -> Any:
        command = {"verb": verb, "arguments": packed(arguments), "seconds": self._step_seconds}
        with self._lock:
            if self.lost is not None:
                raise EngineLost(self.lost, silent=True)
            try:
                replies = self._ask(command)
            except (OSError, EOFError, ValueError) as error:
                self.stacks = error.stacks if isinstance(error, Ended) else ""
                words = f"a process of the engine went during {verb}: {error}"
                raise self._lose(words, silent=self._is_silent(error)) from error
            return self._agreed(verb, replies)

    def _ask(self, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        message = laid_out(command)
        for connection in self._connections:
            connection.send_frame(message)
        limit = self._step_seconds + GRACE_SECONDS
        replies = answers(self._connections, lambda reply: "fault" in reply, limit)
        return [replies[number] for number in sorted(replies)]

    def _agreed(self, verb: str, replies: Sequence[dict[str, Any]]) -> Any:
        """Return the leader's answer, if all are sound or all refuse alike."""
        faults = [reply["fault"] for reply in replies if "fault" in reply]
        exhausted = any(reply.get("exhausted") for reply in replies)
        if faults and len(self._connections) == 1 and not exhausted:
            # As a fault in this process would be. A process without memory is given up.
            raise RuntimeError(f"{verb} failed in the engine's process:\n{faults[0]}")
        refusals = ["refusal" in reply for reply in replies]
        if faults or any(refusals) != all(refusals):
            raise self._lose(f"{verb} failed in a process of the engine:\n{''.join(faults)}")
        if any(refusals):
            raise replies[0]["refusal"]
        return replies[0]["value"]

    def _is_silent(self, error: Exception) -> bool:
        """Return whether a process just vanished: it did not say why, it answered until then, and
        it was not the kernel that killed it for its memory."""
        vanished = isinstance(error, EOFError | ConnectionError) and not isinstance(error, Ended)
        return vanished and oom_kills() == self._oom_kills

    def _lose(self, reason: str, *, silent: bool = False) -> EngineLost:
        self.lost = reason
        for connection in self._connections:
            connection.close()
        self._on_lost(reason)
        return EngineLost(reason, silent=silent)

    def _resident(self, name: str) -> RemoteAdapter:
        if name not in self.adapters:
            raise AdapterNotFound(f"no adapter named {name!r}; there are: {sorted(self.adapters)}")
        return self.adapters[name]

    def _refuse_known(self, name: str) -> None:
        if name in self.adapters:
            raise AdapterExists(f"an adapter named {name!r} exists already; choose another name")
