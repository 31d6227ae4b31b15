"""An operation that breaks the engine is found out, and costs its own model only."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from manylora.config import Saving, ServerFile
from manylora.engine import Engine
from manylora.service.contract import Failed, Outcome, Ready, Waiting
from manylora.service.hub_proxy import HubProxy
from manylora.service.server import Service
from manylora.service.state.crash_suspects import MOST_LOSSES, MOST_SILENT_LOSSES, CrashSuspects
from manylora.service.supervision import MOST_FAILURES, keep_up
from manylora.service.wire import messages as m
from manylora.service.wire.outline import outline_of
from manylora.service.wire.sample_messages import decode_sample
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import Store
from manylora.types import EngineLost, Opening, OptimStep, Sample, SamplingParams
from tests.wire.data import random_data
from tests.wire.raw import encode

WHO = "ann"
DEADLY = 13  # tokens that the engine cannot stand


Outcomes = dict[str, list[Outcome]]
Fate = Callable[[int, list[Any]], EngineLost | None]


class Fragile:
    """An engine that is lost when its fate says so of what it is to do."""

    def __init__(self, on_lost: Callable[[str], None], fate: Callable[[list[Any]], Any]):
        self.engine = Engine(Opening("seedling", threads=1))
        self.on_lost = on_lost
        self.fate = fate
        self.lost: EngineLost | None = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.engine, name)
        if not callable(value):
            return value

        def verb(*arguments: Any) -> Any:
            works = arguments[0] if name in ("forward_backward", "admit") else ()
            if works and self.lost is None:
                self.lost = self.fate(list(works))
                if self.lost is not None:
                    self.on_lost("it broke")
            if self.lost is not None:
                raise self.lost
            return value(*arguments)

        return verb


class Group:
    """Opens fragile engines; `fate` is given the number of the engine, from 1 on, and its work."""

    def __init__(self, fate: Fate) -> None:
        self.fate = fate
        self.opened = 0

    def open(self, on_lost: Callable[[str], None]) -> Any:
        self.opened += 1
        return (Fragile(on_lost, partial(self.fate, self.opened)),)

    def stacks(self) -> str:
        return ""


def is_deadly(work: Any) -> bool:
    if isinstance(work, Sample):
        return any(len(prompt) == DEADLY for prompt in work.prompts)
    return any(len(datum) == DEADLY for datum in work.data)


def deadly(number: int, works: list[Any], *, silent: bool = False) -> EngineLost | None:
    """Work of so many tokens breaks every engine."""
    return EngineLost("it broke", silent=silent) if any(map(is_deadly, works)) else None


def unlucky(number: int, works: list[Any]) -> EngineLost | None:
    """Somebody kills an engine whenever such work runs, and then is content."""
    return deadly(number, works, silent=True) if number < MOST_SILENT_LOSSES else None


def broken(number: int, works: list[Any]) -> EngineLost | None:
    """No engine can do anything."""
    return EngineLost("it broke", silent=True)


class ShortLived:
    """Each engine is lost over its second training."""

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()

    def __call__(self, number: int, works: list[Any]) -> EngineLost | None:
        self.seen[number] += 1
        return EngineLost("it broke", silent=True) if self.seen[number] == 2 else None


class Client:
    """Trains over whatever hub is there, as an SDK does that sees pauses only."""

    def __init__(self, hub: HubProxy):
        self.hub = hub
        self.model = ""

    async def begin(self) -> None:
        lora = m.LoraConfig(rank=2, seed=1)
        async with self.hub.entered() as hub:
            session = await hub.sessions.create(WHO, m.CreateSessionRequest())
            request = m.CreateModelRequest(
                session_id=session, model_seq_id=0, base_model="seedling", lora_config=lora
            )
            made = await hub.training.create_model(WHO, request, lora)
        assert made.model_id is not None
        self.model = made.model_id
        await self.result(made.request_id)

    async def data(self, seq: int, tokens: int) -> str:
        body = encode(self.model, seq, random_data(seq, 1, lengths=(tokens, tokens + 1)))
        submit = outline_of(body, WireLimits())
        async with self.hub.entered() as hub:
            return (await hub.training.forward_backward(WHO, submit)).request_id

    async def step(self, seq: int) -> str:
        adam = m.WireAdamParams(learning_rate=1e-3)
        request = m.OptimStepRequest(model_id=self.model, seq_id=seq, adam_params=adam)
        async with self.hub.entered() as hub:
            return (await hub.training.submit(WHO, request)).request_id

    async def result(self, request_id: str) -> Outcome:
        while True:
            outcome = await self.hub.outcome(WHO, request_id, 30.0)
            if not isinstance(outcome, Waiting):
                return outcome


def run(folder: Path, scenario: Callable[[HubProxy], Any], fate: Fate = deadly) -> int:
    """Keep a service up while `scenario` runs; returns how many engines that took."""
    settings = ServerFile(
        base="seedling", data_dir=folder, aliases=[], threads=1, drain_seconds=5.0,
        saving=Saving(every_steps=1),
    )  # fmt: skip
    group = Group(fate)

    async def main() -> None:
        hub, stop = HubProxy(), asyncio.Event()
        service = Service(settings, Store.in_folder(folder), WireLimits())
        stopping = asyncio.create_task(stop.wait())
        keeping = asyncio.create_task(
            keep_up(hub, service, group, stopping, lambda: None)  # pyrefly: ignore[bad-argument-type]
        )
        try:
            async with asyncio.timeout(120.0):
                playing = asyncio.create_task(scenario(hub))
                await asyncio.wait([playing, keeping], return_when=asyncio.FIRST_COMPLETED)
                if playing.done():
                    await playing
                playing.cancel()
        finally:
            stop.set()
            await keeping
            await service.stop()

    asyncio.run(main())
    return group.opened


async def train(hub: HubProxy, deadly_step: Mapping[str, int], steps: int) -> Outcomes:
    """What these clients see, each of which does some deadly work at one step (0: at none)."""
    clients = {name: Client(hub) for name in deadly_step}
    for client in clients.values():
        await client.begin()

    async def live(name: str) -> list[Outcome]:
        client, ids = clients[name], []
        for step in range(1, steps + 1):
            tokens = DEADLY if step == deadly_step[name] else 10
            ids += [await client.data(2 * step - 1, tokens), await client.step(2 * step)]
        return [await client.result(id) for id in ids]

    found = await asyncio.gather(*(live(name) for name in clients))
    return dict(zip(clients, found, strict=True))


@pytest.mark.parametrize("silent", [False, True])
def test_only_the_model_whose_work_breaks_the_engine_fails(tmp_path: Path, silent: bool) -> None:
    seen: Outcomes = {}

    async def scenario(hub: HubProxy) -> None:
        seen.update(await train(hub, {"sound": 0, "deadly": 2}, 3))

    opened = run(tmp_path, scenario, partial(deadly, silent=silent))
    assert opened == 1 + (MOST_SILENT_LOSSES if silent else MOST_LOSSES)
    assert all(isinstance(outcome, Ready) for outcome in seen["sound"])
    kinds = [type(outcome) for outcome in seen["deadly"]]
    assert kinds == [Ready, Ready, Failed, Failed, Failed, Failed]
    failed = seen["deadly"][2]
    assert isinstance(failed, Failed) and "operation 3 was running" in failed.error


def test_what_was_there_whenever_somebody_killed_an_engine_goes_on(tmp_path: Path) -> None:
    seen: Outcomes = {}

    async def scenario(hub: HubProxy) -> None:
        seen.update(await train(hub, {"one": 1, "other": 2}, 3))

    assert run(tmp_path, scenario, unlucky) == MOST_SILENT_LOSSES
    assert all(isinstance(outcome, Ready) for outcomes in seen.values() for outcome in outcomes)


def test_engines_that_get_something_done_are_replaced_for_ever(tmp_path: Path) -> None:
    """Each step is saved before the client asks for the next."""
    seen: list[Outcome] = []
    steps = MOST_FAILURES + 3

    async def scenario(hub: HubProxy) -> None:
        client = Client(hub)
        await client.begin()
        for step in range(steps):
            seen.append(await client.result(await client.data(2 * step + 1, 10)))
            seen.append(await client.result(await client.step(2 * step + 2)))

    assert run(tmp_path, scenario, ShortLived()) == steps
    assert all(isinstance(outcome, Ready) for outcome in seen)


def test_engines_that_get_nothing_done_are_the_end(tmp_path: Path) -> None:
    async def scenario(hub: HubProxy) -> None:
        await train(hub, {"one": 0, "other": 0}, 1)

    with pytest.raises(EngineLost, match="again and again"):
        run(tmp_path, scenario, broken)


def test_a_sample_that_breaks_the_engine_fails_alone(tmp_path: Path) -> None:
    seen: list[Outcome] = []

    async def scenario(hub: HubProxy) -> None:
        client = Client(hub)
        await client.begin()
        session = client.model.partition(":")[0]
        asked = m.CreateSamplingSessionRequest(
            session_id=session, sampling_session_seq_id=1, base_model="seedling"
        )
        async with hub.entered() as entered:
            sampler = await entered.samplers.create(WHO, asked, None)
        for seq, length in ((1, 5), (2, DEADLY), (3, 6)):
            prompt = {"chunks": [{"type": "encoded_text", "tokens": list(range(5, 5 + length))}]}
            body = {
                "sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "num_samples": 1,
                "sampling_params": {"max_tokens": 3, "temperature": 0.0},
            }  # fmt: skip
            submit = decode_sample(json.dumps(body).encode(), WireLimits())
            async with hub.entered() as entered:
                submitted = await entered.samplers.sample(WHO, submit)
            seen.append(await client.result(submitted.request_id))

    run(tmp_path, scenario)
    assert [type(outcome) for outcome in seen] == [Ready, Failed, Ready]


@pytest.mark.parametrize("losses", [0, 1, 2, 3, 5, 6])
@pytest.mark.parametrize("silent", [False, True])
def test_counting(losses: int, silent: bool) -> None:
    suspects, loss = CrashSuspects(), EngineLost("it broke", silent=silent)
    most = MOST_SILENT_LOSSES if silent else MOST_LOSSES
    step = OptimStep(adapter="a", params=None, seq=3)  # type: ignore[arg-type]
    sample = Sample(adapter=None, prompts=[[1]], params=SamplingParams(seed=4), snapshot="s")
    for _ in range(losses):
        suspects.note([(step, loss), (sample, loss)])
    for operation in (step, sample):
        assert suspects.is_suspect(operation) == (losses > 0)
        assert suspects.is_given_up(operation) == (losses >= most)
    assert suspects.is_numbered_given_up("a", 3) == (losses >= most)
    suspects.acquit(step)
    assert suspects.is_suspect(step) == (losses >= most)
    assert not suspects.is_suspect(OptimStep(adapter="a", params=None, seq=4))  # type: ignore[arg-type]
