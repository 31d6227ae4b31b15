"""Tenants prepare their runs' data in turns."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from manylora.config import AdapterEntry, SftSettings
from manylora.runs.encode import Encoder
from manylora.service.state.data_preparation import MOST_PAUSED, Preparing
from manylora.service.wire.run_messages import Data, SubmitRunRequest
from tests.unit.service.test_maintenance import Place


def test_tenants_take_turns_and_ones_own_follow_each_other():
    async def whole() -> None:
        preparing, log = Preparing(), []

        async def prepare(tenant: str, name: str, pieces: int) -> None:
            turn = preparing.of(tenant)

            def work() -> None:
                for piece in range(pieces):
                    log.append(f"{name}{piece}")
                    turn.pass_on()

            async with turn:
                log.append(name)
                await asyncio.to_thread(work)

        async with preparing.of("first"):  # so that all are in line
            work = [("ann", "A", 3), ("ann", "B", 1), ("bob", "C", 2), ("cat", "D", 1)]
            tasks = [asyncio.create_task(prepare(*each)) for each in work]
            await asyncio.sleep(0)
            assert log == []
        await asyncio.gather(*tasks)
        assert log == ["A", "A0", "C", "C0", "D", "D0", "A1", "C1", "A2", "B", "B0"]

    asyncio.run(whole())


def test_one_that_fails_or_is_cancelled_holds_nobody_up():
    async def whole() -> None:
        preparing = Preparing()

        async def fail() -> None:
            async with preparing.of("ann"):
                raise ValueError

        with pytest.raises(ValueError):
            await fail()
        async with preparing.of("ann"):
            waiting = asyncio.create_task(fail())
            other = asyncio.create_task(preparing.begin("bob"))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.sleep(0)
        await asyncio.wait_for(other, 10)
        preparing.end("bob")
        async with asyncio.timeout(10), preparing.of("ann"):
            pass

    asyncio.run(whole())


def test_one_that_is_cancelled_as_its_turn_comes_gives_it_back():
    async def whole() -> None:
        preparing = Preparing()
        async with preparing.of("first"):  # so that all are in line
            cancelled = asyncio.create_task(preparing.begin("ann"))
            others = [asyncio.create_task(preparing.begin(who)) for who in ("bob", "ann")]
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait_for(others[0], 10)
        preparing.end("bob")
        await asyncio.wait_for(others[1], 10)
        preparing.end("ann")
        async with asyncio.timeout(10), preparing.of("ann"):
            assert cancelled.cancelled()

    asyncio.run(whole())


def test_no_more_have_begun_than_there_are_threads_for():
    async def whole() -> None:
        preparing, begun = Preparing(), 0
        release = asyncio.Event()

        async def prepare(number: int) -> None:
            nonlocal begun
            async with preparing.of(f"t{number}"):
                begun += 1
                await preparing.pass_on(f"t{number}")
                await release.wait()

        async with preparing.of("first"):  # so that all are in line
            tasks = [asyncio.create_task(prepare(n)) for n in range(3 * MOST_PAUSED)]
            await asyncio.sleep(0)
        for _ in range(20 * MOST_PAUSED):
            await asyncio.sleep(0)
        assert begun == MOST_PAUSED + 1
        release.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert begun == 3 * MOST_PAUSED

    asyncio.run(whole())


def request(who: str, rows: int) -> SubmitRunRequest:
    entry = AdapterEntry(name=who, sft=SftSettings(train="x.jsonl", max_steps=1, batch_size=1))
    row = f'{{"prompt": "{who}", "completion": "b"}}\n'
    return SubmitRunRequest(adapter=entry, data=Data(train=row * rows))


def test_one_tenants_data_do_not_keep_anothers_run_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    in_line, pieces = threading.Event(), []
    tokenise = Encoder._tokenise

    def watched(self: Encoder, texts: list[str]) -> Any:
        pieces.append(texts[0])
        if pieces == ["ann"]:
            assert in_line.wait(60)
        return tokenise(self, texts)

    monkeypatch.setattr(Encoder, "_tokenise", watched)

    async def whole() -> None:
        place = Place(tmp_path / "data")
        async with place.open():
            hub, preparing = place.hub, place.hub.runs._preparing
            runs = [("ann", await hub.runs.submit("ann", request("ann", 5000)))]
            while not pieces:
                await asyncio.sleep(0.01)
            runs.append(("bob", await hub.runs.submit("bob", request("bob", 2))))
            while not preparing.others_wait:
                await asyncio.sleep(0.01)
            in_line.set()
            for tenant, run in runs:
                while (now := await hub.runs.get(tenant, run.id, 0)).status in (
                    "queued",
                    "running",
                ):
                    await asyncio.sleep(0.05)
                assert now.status == "completed", now.error

    asyncio.run(whole())
    assert pieces[:3] == ["ann", "bob", "ann"]
    assert pieces.count("ann") == 5


def test_a_run_that_is_cancelled_is_left_in_the_middle_of_tokenising(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, pieces = threading.Event(), []
    tokenise = Encoder._tokenise

    def watched(self: Encoder, texts: list[str]) -> Any:
        pieces.append(texts[0])
        assert asked.wait(60)
        return tokenise(self, texts)

    monkeypatch.setattr(Encoder, "_tokenise", watched)

    async def whole() -> None:
        place = Place(tmp_path / "data")
        async with place.open():
            hub = place.hub
            run = await hub.runs.submit("ann", request("ann", 5000))
            while not pieces:
                await asyncio.sleep(0.01)
            live = hub.runs._live[run.id]
            await hub.runs.cancel("ann", run.id)
            while not live.stop.is_set():
                await asyncio.sleep(0.01)
            asked.set()
            while (now := await hub.runs.get("ann", run.id, 0)).status == "cancelling":
                await asyncio.sleep(0.05)
            assert now.status == "cancelled", now.error

    asyncio.run(whole())
    assert pieces == ["ann"]
