"""Whose something is, whatever state it is in: while it runs, when it is done, after a restart."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from manylora.config import AdapterEntry, SftSettings
from manylora.service.contract import Ready
from manylora.service.http_errors import NotFound
from manylora.service.wire import messages as m
from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.outline import outline_of
from manylora.service.wire.run_messages import Data, SubmitRunRequest
from manylora.service.wire.sample_messages import decode_sample
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import Store
from manylora.types import Conflict, DataError
from tests.unit.service import bodies
from tests.unit.service.test_maintenance import WHO, Place

STRANGER = "bob"
NOBODYS = f"s{'0' * 24}:train:0:1"


def opened(tmp_path: Path, test: Callable[[Place], Awaitable[None]]) -> None:
    async def whole() -> None:
        place = Place(tmp_path / "data")
        async with place.open():
            await place.begin()
            await test(place)

    asyncio.run(whole())


async def refused(place: Place, *ids: str) -> None:
    """A stranger hears of these what he hears of things that nobody has."""
    for id in ids:
        with pytest.raises(NotFound) as theirs:
            await asyncio.wait_for(place.hub.outcome(STRANGER, id, 30.0), 20.0)
        with pytest.raises(NotFound) as nobodys:
            await place.hub.outcome(STRANGER, NOBODYS, 30.0)
        assert str(theirs.value).replace(id, NOBODYS) == str(nobodys.value)


def test_a_stranger_polls_in_vain_before_while_and_after(tmp_path: Path):
    async def test(place: Place) -> None:
        sampler = await place.ephemeral(1)
        async with place.engine_held():
            waiting = [await place.data(2), await place.step(3), await place.sample(sampler, 0)]
            early = await place.data(5)
            await refused(place, *waiting, early)
        for id in waiting:
            assert isinstance(await place.result(id), Ready)
        await refused(place, *waiting, early, f"{place.model}:0")
        await place.step(4)
        assert isinstance(await place.result(early), Ready)

    opened(tmp_path, test)


def test_a_stranger_sees_no_run_that_goes_on(tmp_path: Path):
    async def test(place: Place) -> None:
        hub = place.hub
        entry = AdapterEntry(name="x", sft=SftSettings(train="x.jsonl", max_steps=3))
        data = Data(train='{"prompt": "a", "completion": "b"}\n')
        async with place.engine_held():
            run = await hub.runs.submit(WHO, SubmitRunRequest(adapter=entry, data=data))
            for ask in (hub.runs.get(STRANGER, run.id, 0), hub.runs.cancel(STRANGER, run.id)):
                with pytest.raises(NotFound):
                    await ask
            assert (await hub.runs.page(STRANGER, 20, 0)).runs == []
        for _ in range(600):
            now = await hub.runs.get(WHO, run.id, 0)
            if now.status == "completed":
                break
            await asyncio.sleep(0.05)
        assert now.status == "completed"  # nobody cancelled it

    opened(tmp_path, test)


async def send(place: Place, seq: int, datum: pb.Datum) -> str:
    message = bodies.request([datum], model_id=place.model, seq_id=seq)
    submit = outline_of(message.SerializeToString(), WireLimits())
    return (await place.hub.training.forward_backward(WHO, submit)).request_id


def test_a_used_number_stays_used_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the same contents it is the same request; with others it is a mistake that is told."""
    place = Place(tmp_path / "data")
    other = bodies.plain_datum(5)

    async def everything_is_still_used() -> None:
        for seq in (1, 2, 4):
            with pytest.raises(DataError, match=r"other contents|was used before"):
                await send(place, seq, other)
        with pytest.raises(DataError, match="was used before"):
            await place.step(1)
        assert await place.data(1) == f"{place.model}:1"
        assert await place.data(4) == f"{place.model}:4"
        model = await place.hub.adapters.require(WHO, place.model)
        assert (model.order.next_seq, model.order.num_early) == (3, 1)
        lora = m.LoraConfig(rank=3, seed=1)
        changed = m.CreateModelRequest(
            session_id=place.session, model_seq_id=0, base_model="seedling", lora_config=lora
        )
        with pytest.raises(Conflict):
            await place.hub.training.create_model(WHO, changed, lora)

    async def whole() -> None:
        async with place.open():
            await place.begin()
            await place.result(await place.data(1))
            await place.result(await place.data(2))
            await place.data(4)  # waits for its turn
            await everything_is_still_used()
            host = place.hub.resources.host
            monkeypatch.setattr(host.units[0].pager, "save_all", lambda: None)  # as if killed
        async with place.open():
            await everything_is_still_used()
            await place.data(3)
            for seq in (3, 4):
                assert isinstance(await place.result(f"{place.model}:{seq}"), Ready)

    asyncio.run(whole())


def test_so_does_that_of_a_sample(tmp_path: Path):
    """One that waits for a snapshot, whose operation waits for one that has not come."""
    place = Place(tmp_path / "data", drain_seconds=0.0)

    async def sample(prompt: list[int]) -> str:
        body = {
            "sampling_session_id": f"{place.session}:sample:9",
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": {"max_tokens": 2, "seed": 1},
        }
        submit = decode_sample(json.dumps(body).encode(), WireLimits())
        return (await place.hub.samplers.sample(WHO, submit)).request_id

    async def whole() -> None:
        async with place.open():
            await place.begin()
            save = m.SaveWeightsForSamplerRequest(
                model_id=place.model, seq_id=2, sampling_session_seq_id=9
            )
            await place.hub.training.submit(WHO, save)
            id = await sample([7, 8, 9])
            with pytest.raises(DataError, match="other contents"):
                await sample([7, 8])
        async with place.open():
            with pytest.raises(DataError, match="other contents"):
                await sample([7, 8])
            assert await sample([7, 8, 9]) == id
            await place.data(1)
            assert isinstance(await place.result(id), Ready)

    asyncio.run(whole())


def unguessable(ids: Sequence[str], prefix: str, bits: int) -> None:
    """Random in every bit: whoever has seen some, or knows when they were made, or how a generator
    was seeded, knows nothing of the others."""
    assert len(set(ids)) == len(ids) >= 64
    numbers = [int(id.removeprefix(prefix), 16) for id in ids]
    for bit in range(bits):
        # All of 64 fair coins alike: once in 2⁶³.
        assert len({number >> bit & 1 for number in numbers}) == 2, f"bit {bit} never changes"
    steps = {b - a for a, b in pairwise(numbers)}
    assert len(steps) == len(ids) - 1
    ascending = sum(b > a for a, b in pairwise(numbers))
    assert 0 < ascending < len(ids) - 1


def test_no_id_can_be_guessed(tmp_path: Path):
    async def test(place: Place) -> None:
        hub = place.hub

        async def sessions() -> list[str]:
            random.seed(1)
            return [await hub.sessions.create(WHO, m.CreateSessionRequest()) for _ in range(40)]

        first, second = await sessions(), await sessions()
        unguessable([*first, *second], "s", 96)

    opened(tmp_path, test)


def test_nor_that_of_a_run(tmp_path: Path):
    async def test(place: Place) -> None:
        runs = place.hub.runs
        entry = AdapterEntry(name="x", sft=SftSettings(train="x.jsonl", max_steps=3))
        request = SubmitRunRequest(adapter=entry, data=Data(train="{}\n"))
        ids: list[str] = []
        for _ in range(2):
            random.seed(1)
            ids += [runs._accept(WHO, request)[0].id for _ in range(32)]
        unguessable(ids, "run-", 64)

    opened(tmp_path, test)


def test_nor_a_key(tmp_path: Path):
    with_keys = Store.in_folder(tmp_path)
    try:
        keys = []
        for _ in range(2):
            random.seed(1)
            keys += [with_keys.keys.create(WHO) for _ in range(32)]
    finally:
        with_keys.close()
    secret = [key.removeprefix("tml-") for key in keys]
    assert len({*secret}) == 64 and all(len(key) >= 43 for key in secret)
    for place in range(42):  # base64 of 32 bytes; the last character has fewer bits
        assert len({key[place] for key in secret}) > 16, f"character {place} hardly changes"
