"""An operation that breaks the engine is found out, and costs its own model only."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manylora.config import ServerFile
from manylora.engine import Engine
from manylora.service.breakages import MOST_LOSSES, Breakages
from manylora.service.contract import Failed, Outcome, Ready, Waiting
from manylora.service.engines import keep_up
from manylora.service.late import LateHub
from manylora.service.server import Service
from manylora.service.wire import messages as m
from manylora.service.wire.codec import decode_forward_backward
from manylora.service.wire.limits import WireLimits
from manylora.service.wire.sampling import decode_sample
from manylora.store import Store
from manylora.types import EngineLost, OptimStep, Sample, SamplingParams
from tests.wire.data import random_data
from tests.wire.raw import encode

WHO = "ann"
DEADLY = 13  # tokens that the engine cannot stand


class Fragile:
    """An engine that is lost over some work."""

    def __init__(self, on_lost: Callable[[str], None]):
        self.engine = Engine("seedling", threads=1)
        self.on_lost = on_lost
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.engine, name)
        if not callable(value):
            return value

        def verb(*arguments: Any) -> Any:
            works = arguments[0] if name in ("forward_backward", "admit") else ()
            if any(_is_deadly(work) for work in works) and not self.lost:
                self.lost = True
                self.on_lost("it broke")
            if self.lost:
                raise EngineLost("it broke")
            return value(*arguments)

        return verb


def _is_deadly(work: Any) -> bool:
    if isinstance(work, Sample):
        return any(len(prompt) == DEADLY for prompt in work.prompts)
    return any(len(datum) == DEADLY for datum in work.data)


class Group:
    """Opens fragile engines."""

    def __init__(self) -> None:
        self.opened = 0

    def open(self, on_lost: Callable[[str], None]) -> Any:
        self.opened += 1
        return (Fragile(on_lost),)

    def stacks(self) -> str:
        return ""


class Client:
    """Trains over whatever hub is there, as an SDK does that sees pauses only."""

    def __init__(self, hub: LateHub):
        self.hub: Any = hub
        self.model = ""

    async def begin(self) -> None:
        session = await self.hub.create_session(WHO, m.CreateSessionRequest())
        made = await self.hub.create_model(
            WHO,
            m.CreateModelRequest(
                session_id=session, model_seq_id=0, base_model="seedling",
                lora_config=m.LoraConfig(rank=2, seed=1),
            ),
        )  # fmt: skip
        self.model = made.model_id
        await self.result(made.request_id)

    async def data(self, seq: int, tokens: int) -> str:
        body = encode(self.model, seq, random_data(seq, 1, lengths=(tokens, tokens + 1)))
        submit = decode_forward_backward(body, WireLimits())
        return (await self.hub.forward_backward(WHO, submit)).request_id

    async def step(self, seq: int) -> str:
        adam = m.WireAdamParams(learning_rate=1e-3)
        request = m.OptimStepRequest(model_id=self.model, seq_id=seq, adam_params=adam)
        return (await self.hub.optim_step(WHO, request)).request_id

    async def result(self, request_id: str) -> Outcome:
        while True:
            outcome = await self.hub.outcome(WHO, request_id, 30.0)
            if not isinstance(outcome, Waiting):
                return outcome


def run(folder: Path, scenario: Callable[[LateHub], Any]) -> int:
    """Keep a service up while `scenario` runs; returns how many engines that took."""
    settings = ServerFile(
        base="seedling", data_dir=folder, aliases=[], threads=1, drain_seconds=5.0
    )
    group = Group()

    async def main() -> None:
        hub, stop = LateHub(), asyncio.Event()
        service = Service(settings, Store.in_folder(folder), WireLimits())
        stopping = asyncio.create_task(stop.wait())
        keeping = asyncio.create_task(
            keep_up(hub, service, group, stopping, lambda: None)  # pyrefly: ignore[bad-argument-type]
        )
        try:
            async with asyncio.timeout(120.0):
                await scenario(hub)
        finally:
            stop.set()
            await keeping
            await service.stop()

    asyncio.run(main())
    return group.opened


def test_only_the_model_whose_work_breaks_the_engine_fails(tmp_path: Path) -> None:
    seen: dict[str, list[Outcome]] = {}

    async def scenario(hub: LateHub) -> None:
        clients = {name: Client(hub) for name in ("sound", "deadly")}
        for client in clients.values():
            await client.begin()

        async def live(name: str) -> None:
            client, ids = clients[name], []
            for step in range(3):
                tokens = DEADLY if name == "deadly" and step == 1 else 10
                ids += [await client.data(2 * step + 1, tokens), await client.step(2 * step + 2)]
            seen[name] = [await client.result(id) for id in ids]

        await asyncio.gather(*(live(name) for name in clients))

    opened = run(tmp_path, scenario)
    assert opened == MOST_LOSSES + 1
    assert all(isinstance(outcome, Ready) for outcome in seen["sound"])
    kinds = [type(outcome) for outcome in seen["deadly"]]
    assert kinds == [Ready, Ready, Failed, Failed, Failed, Failed]
    failed = seen["deadly"][2]
    assert isinstance(failed, Failed) and "operation 3 was running" in failed.error


def test_a_sample_that_breaks_the_engine_fails_alone(tmp_path: Path) -> None:
    seen: list[Outcome] = []

    async def scenario(hub: Any) -> None:
        client = Client(hub)
        await client.begin()
        session = client.model.partition(":")[0]
        sampler = await hub.create_sampling_session(
            WHO,
            m.CreateSamplingSessionRequest(
                session_id=session, sampling_session_seq_id=1, base_model="seedling"
            ),
            None,
        )
        for seq, length in ((1, 5), (2, DEADLY), (3, 6)):
            prompt = {"chunks": [{"type": "encoded_text", "tokens": list(range(5, 5 + length))}]}
            body = {
                "sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "num_samples": 1,
                "sampling_params": {"max_tokens": 3, "temperature": 0.0},
            }  # fmt: skip
            submit = decode_sample(json.dumps(body).encode(), WireLimits())
            seen.append(await client.result((await hub.sample(WHO, submit)).request_id))

    run(tmp_path, scenario)
    assert [type(outcome) for outcome in seen] == [Ready, Failed, Ready]


@pytest.mark.parametrize("losses", [0, 1, MOST_LOSSES])
def test_counting(losses: int) -> None:
    breakages = Breakages()
    step = OptimStep(adapter="a", params=None, seq=3)  # type: ignore[arg-type]
    sample = Sample(adapter=None, prompts=[[1]], params=SamplingParams(seed=4), snapshot="s")
    for _ in range(losses):
        breakages.note([step, sample])
    for operation in (step, sample):
        assert breakages.is_suspect(operation) == (losses > 0)
        assert breakages.is_given_up(operation) == (losses >= MOST_LOSSES)
    assert breakages.is_numbered_given_up("a", 3) == (losses >= MOST_LOSSES)
    assert not breakages.is_suspect(OptimStep(adapter="a", params=None, seq=4))  # type: ignore[arg-type]
