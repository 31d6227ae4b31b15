"""This arm of `benchmarks.service` measures what the journal costs in CPU time.

The same work runs in turns with the journal and with one that writes nothing.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.service_load import summary
from manylora.config import ServerFile
from manylora.journal import Journal, Record
from manylora.processes import EngineGroup
from manylora.service.contract import Failed, Ready
from manylora.service.server import Service
from manylora.service.state.hub import TinkerHub
from manylora.service.wire import messages as m
from manylora.service.wire.outline import outline_of
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import Store
from tests.family import engine_processes
from tests.wire.data import random_data
from tests.wire.raw import encode

WHO = "dev"


class NullJournal:
    """A `NullJournal` takes every record and writes none; other calls go to the real one."""

    def __init__(self, real: Journal):
        self._real = real

    def append(self, record: Record) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Trainee:
    """A `Trainee` is one model, trained without HTTP in between."""

    def __init__(self, hub: TinkerHub, model: str, number: int, tokens: int):
        self._hub, self._model, self._seq = hub, model, 0
        self._data = random_data(number, 1, lengths=(tokens, tokens + 1))

    async def step(self) -> None:
        """Submit a forward_backward and an optimizer step, and wait for both."""
        body = encode(self._model, self._seq + 1, self._data)
        outline = outline_of(body, WireLimits())
        adam = m.WireAdamParams(learning_rate=1e-4)
        step = m.OptimStepRequest(model_id=self._model, seq_id=self._seq + 2, adam_params=adam)
        self._seq += 2
        ids = [
            (await self._hub.training.forward_backward(WHO, outline)).request_id,
            (await self._hub.training.submit(WHO, step)).request_id,
        ]
        for id in ids:
            outcome = await self._hub.outcome(WHO, id, 60.0)
            assert isinstance(outcome, Ready) and not isinstance(outcome, Failed), outcome


async def _trainees(hub: TinkerHub, count: int, tokens: int) -> list[Trainee]:
    session = await hub.sessions.create(WHO, m.CreateSessionRequest())
    made = []
    for number in range(count):
        lora = m.LoraConfig(rank=8, seed=number)
        request = m.CreateModelRequest(
            session_id=session, model_seq_id=number, base_model="seedling", lora_config=lora
        )
        submitted = await hub.training.create_model(WHO, request, lora)
        await hub.outcome(WHO, submitted.request_id, 60.0)
        assert submitted.model_id is not None
        made.append(Trainee(hub, submitted.model_id, number, tokens))
    return made


async def journal_cost(
    folder: Path, shapes: Sequence[tuple[int, int]], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Measure CPU of a step with and without the journal; a shape is models, and tokens of each.

    The engine has its own process, as in a server, so the control process's CPU time is what the
    journal can add to, without the noise of the numbers.
    """
    settings = ServerFile(base="seedling", aliases=[], data_dir=folder, threads=1)
    group = EngineGroup(settings.opening(), step_seconds=600.0)
    service = Service(settings, Store.in_folder(folder), WireLimits())
    try:
        hub = await service.start(await asyncio.to_thread(group.open))
        rows = [await _cost(hub, *shape, rounds, steps) for shape in shapes]
        await service.stop()
    finally:
        group.close()
    return rows


async def _cost(hub: TinkerHub, count: int, tokens: int, rounds: int, steps: int) -> dict[str, Any]:
    real = hub.resources.journal
    journals: dict[str, Any] = {"journal": real, "none": NullJournal(real)}
    trainees = await _trainees(hub, count, tokens)
    what = ("control", "wall", "writer", "engine")
    seen: dict[str, dict[str, list[float]]] = {name: {one: [] for one in what} for name in journals}
    for number in range(rounds + 1):
        # Who comes first changes from round to round.
        for name in list(journals)[:: 1 if number % 2 else -1]:
            hub.resources.journal = journals[name]
            before = _clocks(real)
            for _ in range(steps):
                await asyncio.gather(*(trainee.step() for trainee in trainees))
            spent = [1e3 * (b - a) / steps for a, b in zip(before, _clocks(real), strict=True)]
            if number:  # the first round warms up
                for one, milliseconds in zip(what, spent, strict=True):
                    seen[name][one].append(milliseconds)
    hub.resources.journal = real
    whole = statistics.median(seen["none"]["control"]) + statistics.median(seen["none"]["engine"])
    pairs = zip(seen["journal"]["control"], seen["none"]["control"], strict=True)
    added = [a - b for a, b in pairs]
    return {
        "models": count,
        "tokens_each": tokens,
        "ms_per_step": {
            f"{one}, {name}": summary(values)
            for one in what
            for name, values in ((name, seen[name][one]) for name in journals)
        },
        "added_control_ms": summary(added),
        "added_share_of_a_step": summary([one / whole for one in added]),
    }


def _clocks(journal: Journal) -> tuple[float, float, float, float]:
    """Return this process's CPU, time, the journal thread's CPU, the engine process's CPU."""
    [engine] = engine_processes(os.getpid())
    own, ran = time.process_time(), time.clock_gettime(_clock_of(engine))
    return own, time.perf_counter(), _cpu(journal._thread), ran


def _clock_of(pid: int) -> int:
    """Return the kernel's clock of a process's CPU time, ended threads included.

    See `man 3 clock_getcpuclockid`.
    """
    return (~pid << 3) | 2


def _cpu(thread: Any) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
