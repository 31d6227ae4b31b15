"""What a server does on its own: silent sessions, gaps, what has been there for too long."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from manylora.config import ServerFile
from manylora.engine import Engine
from manylora.service.contract import Failed, Ready, Waiting
from manylora.service.http_errors import Gone, NotFound
from manylora.service.server import Service
from manylora.service.state.hub import TinkerHub
from manylora.service.state.maintenance import SWEEP_SECONDS, Maintenance
from manylora.service.wire import messages as m
from manylora.service.wire.outline import outline_of
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.sample_messages import decode_sample
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import Store
from manylora.types import Opening, SaveFailed
from tests.unit.service import bodies

WHO, HOUR, GAP = "ann", 3600.0, 100.0
Test = Callable[["Place"], Coroutine[Any, Any, None]]


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Place:
    """A hub over a real engine, whose clocks only a test moves."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.settings = folder, settings
        self.clock, self.wall = Clock(1000.0), Clock(1_800_000_000.0)
        self.hub: TinkerHub
        self.maintenance: Maintenance
        self.session = self.model = ""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        settings = ServerFile(
            base="seedling", data_dir=self.folder, aliases=[], threads=1, session_seconds=60.0,
            **self.settings,
        )  # fmt: skip
        service = Service(
            settings, Store.in_folder(self.folder), WireLimits(), clock=self.clock, wall=self.wall
        )
        self.hub = await service.start([Engine(Opening("seedling", threads=1))])
        assert service._maintenance is not None
        service._maintenance.cancel()
        self.maintenance = Maintenance(self.hub, gap_seconds=GAP)
        try:
            yield
        finally:
            await service.stop()

    async def begin(self) -> None:
        """A session with a model."""
        self.session = await self.hub.sessions.create(WHO, m.CreateSessionRequest())
        lora = m.LoraConfig(rank=2, seed=1)
        request = m.CreateModelRequest(
            session_id=self.session, model_seq_id=0, base_model="seedling", lora_config=lora
        )
        made = await self.hub.training.create_model(WHO, request, lora)
        assert made.model_id is not None
        self.model = made.model_id
        await self.result(f"{self.model}:0")

    async def data(self, seq: int) -> str:
        message = bodies.request([bodies.plain_datum()], model_id=self.model, seq_id=seq)
        submit = outline_of(message.SerializeToString(), WireLimits())
        return (await self.hub.training.forward_backward(WHO, submit)).request_id

    async def step(self, seq: int) -> str:
        params = m.WireAdamParams(learning_rate=1e-3)
        request = m.OptimStepRequest(model_id=self.model, seq_id=seq, adam_params=params)
        return (await self.hub.training.submit(WHO, request)).request_id

    async def ephemeral(self, seq: int, kind: Any = "snapshot") -> str:
        """A sampler of the weights as they are."""
        request = m.SaveWeightsForSamplerRequest(
            model_id=self.model, seq_id=seq, sampling_session_seq_id=seq, kind=kind
        )
        submitted = await self.hub.training.submit(WHO, request)
        assert isinstance(await self.result(submitted.request_id), Ready)
        return f"{self.session}:sample:{seq}"

    async def sample(self, sampler: str, seq: int) -> str:
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [7, 8, 9]}]},
            "sampling_params": {"max_tokens": 2, "seed": 1},
        }
        submit = decode_sample(json.dumps(body).encode(), WireLimits())
        return (await self.hub.samplers.sample(WHO, submit)).request_id

    async def result(self, request_id: str) -> Any:
        outcome = await self.hub.outcome(WHO, request_id, 30.0)
        assert not isinstance(outcome, Waiting), request_id
        return outcome

    async def round(self) -> None:
        """One round of maintenance, with what it set going."""
        await self.maintenance.round()
        await asyncio.gather(*self.maintenance._closing.values())

    async def written(self) -> None:
        """Until the engine has nothing queued, and the writer nothing in hand."""
        host = self.hub.resources.host
        await asyncio.wrap_future(host.call(None, lambda pager: pager._writer.drain()))

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.wall.now += seconds

    @asynccontextmanager
    async def engine_held(self) -> AsyncIterator[None]:
        """Nothing runs meanwhile."""
        begun, free = threading.Event(), threading.Event()
        self.hub.resources.host.call(None, lambda _: (begun.set(), free.wait(60)))
        await asyncio.to_thread(begun.wait, 60)
        try:
            yield
        finally:
            free.set()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Test], None]:
    """`run(test)`: the test in a place that is open, with a session and a model."""

    def go(test: Test) -> None:
        async def whole() -> None:
            place = Place(tmp_path / "data")
            async with place.open():
                await place.begin()
                await test(place)

        asyncio.run(whole())

    return go


def test_a_silent_session_is_closed_and_its_adapter_kept(run):
    async def test(place: Place) -> None:
        hub = place.hub
        await place.data(1)
        await place.result(await place.step(2))
        sampler = await place.ephemeral(3)
        folder = hub.resources.host.snapshot_folder(sampler)
        place.later(59.0)
        await place.round()
        await hub.adapters.require(WHO, place.model)
        await hub.sessions.require(WHO, place.session)
        place.later(59.0)
        await place.round()
        await hub.adapters.require(WHO, place.model)
        place.later(2.0)
        await place.round()
        with pytest.raises(Gone):
            await hub.sessions.require(WHO, place.session)
        with pytest.raises(Gone):
            await place.data(4)
        kept = await hub.checkpoints.get(WHO, TinkerPath(place.model, "weights", "last"))
        assert kept.step == 1
        await place.written()
        assert hub.resources.host.counts()["resident"] == 0
        assert not folder.exists()
        assert sampler not in hub.resources.host.engine.snapshots
        assert not hub.resources.host.state_folder(place.model).exists()

    run(test)


def test_a_session_with_queued_work_is_not_closed(run):
    async def test(place: Place) -> None:
        async with place.engine_held():
            submitted = await place.data(1)
            place.later(1000.0)
            await place.round()
            assert place.hub.sessions.is_open(place.session)
        assert isinstance(await place.result(submitted), Ready)
        await asyncio.sleep(0.05)
        await place.round()
        assert not place.hub.sessions.is_open(place.session)

    run(test)


def test_nor_one_that_comes_back_while_it_is_closed(run):
    async def test(place: Place) -> None:
        await place.data(1)
        await place.result(await place.step(2))
        place.later(61.0)
        async with place.engine_held():
            await place.maintenance.round()
            await place.hub.sessions.require(WHO, place.session)
        await asyncio.gather(*place.maintenance._closing.values())
        assert isinstance(await place.result(await place.data(3)), Ready)

    run(test)


def test_a_gap_times_out_and_stays_closed(run):
    async def test(place: Place) -> None:
        await place.data(1)
        late = [await place.step(3), await place.data(4)]
        place.later(GAP - 1)
        await place.hub.sessions.require(WHO, place.session)
        await place.round()
        assert isinstance(await place.hub.outcome(WHO, late[0], 0.05), Waiting)
        place.later(2.0)
        await place.round()
        for id in late:
            outcome = await place.result(id)
            assert isinstance(outcome, Failed) and "operation 2" in outcome.error
        # The gradient is dropped; then all is as before.
        refused = await place.result(await place.step(5))
        assert isinstance(refused, Failed)
        assert isinstance(await place.result(await place.data(6)), Ready)
        assert isinstance(await place.result(await place.step(7)), Ready)

    run(test)


def test_a_restart_repeats_a_gap_that_was_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def whole() -> None:
        place = Place(tmp_path / "data")
        async with place.open():
            await place.begin()
            await place.data(1)
            await place.step(3)
            place.later(GAP + 1)
            await place.hub.sessions.require(WHO, place.session)
            await place.round()
            await place.step(4)
            before = [
                await place.result(await place.data(5)),
                await place.result(await place.step(6)),
            ]
            journal = place.hub.resources.journal
            assert journal.lag()[0] >= 5  # nothing of it is in a state
            host = place.hub.resources.host
            monkeypatch.setattr(host.units[0].pager, "save_all", lambda: None)  # as if killed
        async with place.open():
            assert (await place.hub.adapters.require(WHO, place.model)).order.next_seq == 7
            after = [await place.result(f"{place.model}:{seq}") for seq in (5, 6)]
            assert after == before
            assert isinstance(await place.result(f"{place.model}:3"), Failed)

    asyncio.run(whole())


def test_results_are_gone_after_their_time(run):
    async def test(place: Place) -> None:
        id = await place.data(1)
        assert isinstance(await place.result(id), Ready)
        place.later(25 * HOUR)
        with pytest.raises(Gone):
            await place.result(id)
        for other in (f"{place.model}:2", f"{place.model}:x", "nobody:train:0:1"):
            with pytest.raises(NotFound):
                await place.result(other)
        with pytest.raises(NotFound):
            await place.hub.outcome("bob", id, 0.1)

    run(test)


def test_snapshots_go_once_nobody_uses_them(run):
    async def test(place: Place) -> None:
        hub, host = place.hub, place.hub.resources.host
        sampler, other = await place.ephemeral(1), await place.ephemeral(2)
        living = await place.ephemeral(3, "inflight")

        async def sweep(seconds: float) -> None:
            place.later(seconds)
            await hub.sessions.require(WHO, place.session)
            place.clock.now += SWEEP_SECONDS
            await hub.sessions.require(WHO, place.session)
            await place.round()
            await place.written()

        def there(name: str) -> bool:
            on_disk = host.snapshot_folder(name).exists()
            assert on_disk == (name in host.engine.snapshots)
            return on_disk

        await sweep(0.0)
        place.later(23 * HOUR)
        assert isinstance(await place.result(await place.sample(sampler, 0)), Ready)
        await sweep(2 * HOUR)
        assert [there(name) for name in (sampler, other, living)] == [True, False, True]
        async with place.engine_held():
            running = await place.sample(sampler, 1)
            place.later(25 * HOUR)
            await hub.sessions.require(WHO, place.session)
            assert await hub.samplers.drop_unused(24 * HOUR) == []
        assert isinstance(await place.result(running), Ready)
        await sweep(25 * HOUR)
        assert [there(name) for name in (sampler, other, living)] == [False, False, True]
        gone = await place.result(await place.sample(sampler, 2))
        assert isinstance(gone, Failed) and "snapshot" in gone.error
        assert isinstance(await place.result(await place.sample(living, 0)), Ready)

    run(test)


def test_the_journal_keeps_what_the_disk_did_not_take(run, monkeypatch: pytest.MonkeyPatch):
    async def test(place: Place) -> None:
        sampler = await place.ephemeral(1)
        await place.result(await place.sample(sampler, 0))
        await asyncio.sleep(0.05)
        results = place.hub.resources.promises.results
        before = list(place.hub.resources.covered)
        assert before

        def full() -> None:
            raise SaveFailed("the disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(results, "flush", full)
            with pytest.raises(SaveFailed):
                await place.round()
        assert list(place.hub.resources.covered) == before
        await place.round()
        assert not place.hub.resources.covered
        assert f"{sampler}:0" not in place.hub.resources.journal.streams()

    run(test)


def test_a_sample_waits_for_the_snapshot_that_is_still_to_be_made(run):
    async def test(place: Place) -> None:
        async with place.engine_held():
            request = m.SaveWeightsForSamplerRequest(
                model_id=place.model, seq_id=1, sampling_session_seq_id=5
            )
            await place.hub.training.submit(WHO, request)
            early = await place.sample(f"{place.session}:sample:5", 0)
        first = await place.result(early)
        assert isinstance(first, Ready)
        again = await place.result(await place.sample(f"{place.session}:sample:5", 1))
        assert again.body == first.body

    run(test)
