"""The arm of `benchmarks.service` that asks what the journal costs: the same work with it and with
one that writes nothing, in turns, in CPU time."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.service_load import summary
from manylora.config import ServerFile
from manylora.engine import Engine
from manylora.scheduler import Journal, Record
from manylora.service.contract import Failed, Ready
from manylora.service.hub import TinkerHub
from manylora.service.server import Service
from manylora.service.wire import messages as m
from manylora.service.wire.codec import decode_forward_backward
from manylora.service.wire.limits import WireLimits
from manylora.store import Store
from tests.wire.data import random_data
from tests.wire.raw import encode

WHO = "dev"


class NullJournal:
    """Takes everything and writes nothing; what else is asked goes to the real one."""

    def __init__(self, real: Journal):
        self._real = real

    def append(self, record: Record) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Trainee:
    """One model, trained without HTTP in between."""

    def __init__(self, hub: TinkerHub, model: str, number: int, tokens: int):
        self._hub, self._model, self._seq = hub, model, 0
        self._data = random_data(number, 1, lengths=(tokens, tokens + 1))

    async def step(self) -> None:
        """Submit a forward_backward and an optimizer step, and wait for both."""
        body = encode(self._model, self._seq + 1, self._data)
        submit = decode_forward_backward(body, WireLimits())
        adam = m.WireAdamParams(learning_rate=1e-4)
        step = m.OptimStepRequest(model_id=self._model, seq_id=self._seq + 2, adam_params=adam)
        self._seq += 2
        ids = [
            (await self._hub.forward_backward(WHO, submit)).request_id,
            (await self._hub.optim_step(WHO, step)).request_id,
        ]
        for id in ids:
            outcome = await self._hub.outcome(WHO, id, 60.0)
            assert isinstance(outcome, Ready) and not isinstance(outcome, Failed), outcome


async def _trainees(hub: TinkerHub, count: int, tokens: int) -> list[Trainee]:
    session = await hub.create_session(WHO, m.CreateSessionRequest())
    made = []
    for number in range(count):
        request = m.CreateModelRequest(
            session_id=session, model_seq_id=number, base_model="seedling",
            lora_config=m.LoraConfig(rank=8, seed=number),
        )  # fmt: skip
        submitted = await hub.create_model(WHO, request)
        await hub.outcome(WHO, submitted.request_id, 60.0)
        assert submitted.model_id is not None
        made.append(Trainee(hub, submitted.model_id, number, tokens))
    return made


async def journal_cost(
    folder: Path, shapes: Sequence[tuple[int, int]], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """CPU of a step with and without the journal; a shape is models at once, tokens of each."""
    settings = ServerFile(base="seedling", aliases=[], data_dir=folder, threads=1)
    service = Service(settings, Store.in_folder(folder), WireLimits())
    hub = await service.start(Engine("seedling", threads=1))
    real = hub.parts.journal
    journals: dict[str, Any] = {"journal": real, "none": NullJournal(real)}
    engine, writer = hub.parts.host.worker._thread, real._thread
    rows = []
    for count, tokens in shapes:
        trainees = await _trainees(hub, count, tokens)
        seen: dict[str, list[float]] = {
            f"{what} {name}": [] for what in ("all", "engine", "wall") for name in journals
        }
        own: list[float] = []
        for number in range(rounds + 1):
            for name, journal in journals.items():
                hub.parts.journal = journal
                before = (time.process_time(), _cpu(engine), time.perf_counter(), _cpu(writer))
                for _ in range(steps):
                    await asyncio.gather(*(trainee.step() for trainee in trainees))
                after = (time.process_time(), _cpu(engine), time.perf_counter(), _cpu(writer))
                spent = [1e3 * (b - a) / steps for a, b in zip(before, after, strict=True)]
                if number:  # the first round warms up
                    for what, milliseconds in zip(("all", "engine", "wall"), spent, strict=False):
                        seen[f"{what} {name}"].append(milliseconds)
                    own += [spent[3]] if name == "journal" else []
        ratios = [a / b - 1 for a, b in zip(seen["all journal"], seen["all none"], strict=True)]
        engines = zip(seen["engine journal"], seen["engine none"], strict=True)
        row = {
            "models": count,
            "tokens_each": tokens,
            "ms_per_step": {name: summary(values) for name, values in seen.items()},
            "writer_thread_ms": summary(own),
            "writer_thread_share": summary(
                [a / b for a, b in zip(own, seen["all journal"], strict=True)]
            ),
            "added_cpu_share": summary(ratios),
            "added_engine_share": summary([a / b - 1 for a, b in engines]),
        }
        rows.append(row)
    await service.stop()
    return rows


def _cpu(thread: Any) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
