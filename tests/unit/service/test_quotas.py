"""What a tenant holds is counted before it is spent: in a hub over a real engine."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from manylora.config import AdapterEntry, SftSettings
from manylora.service.contract import Ready
from manylora.service.http_errors import QuotaExceeded, TooLarge
from manylora.service.state.maintenance import SWEEP_SECONDS
from manylora.service.wire import messages as m
from manylora.service.wire.run_messages import Data, SubmitRunRequest
from manylora.service.wire.sample_messages import decode_sample
from manylora.service.wire.wire_limits import WireLimits
from tests.unit.service.test_maintenance import WHO, Place

Test = Callable[[Place], Coroutine[Any, Any, None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """`run(test, **settings)`: the test in a place that is open, with a session and a model."""

    def go(test: Test, **settings: Any) -> None:
        async def whole() -> None:
            place = Place(tmp_path / "data", **settings)
            async with place.open():
                await place.begin()
                await test(place)

        asyncio.run(whole())

    return go


def sample(sampler: str, seq: int, **params: Any):
    """A decoded asample of a prompt of three tokens."""
    extra = {name: params.pop(name) for name in ("topk_sample_logprobs",) if name in params}
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [7, 8, 9]}]},
        "sampling_params": {"seed": 1, **params},
        **extra,
    }
    return decode_sample(json.dumps(body).encode(), WireLimits())


def test_an_answer_counts_as_long_as_it_can_become(run):
    async def test(place: Place) -> None:
        resources = place.hub.resources
        context = resources.host.engine.base.context_length
        sampler = await place.ephemeral(1)
        async with place.engine_held():
            for seq, most in enumerate((2**31 - 1, None, 5)):
                await place.hub.samplers.sample(WHO, sample(sampler, seq, max_tokens=most))
            assert resources.in_flight[WHO] == context + context + (3 + 5)
        for seq in range(3):
            assert isinstance(await place.result(f"{sampler}:{seq}"), Ready)
        # Tables of likeliest tokens are as long as the answers can become, too.
        longest = sample(sampler, 3, max_tokens=2**31 - 1, topk_sample_logprobs=2)
        id = (await place.hub.samplers.sample(WHO, longest)).request_id
        assert isinstance(await place.result(id), Ready)
        assert not resources.in_flight

    run(test)


def test_sessions_are_counted_and_forgotten(run):
    async def test(place: Place) -> None:
        hub, store = place.hub, place.hub.resources.store
        full = m.CreateSessionRequest(user_metadata={"a": "x" * 4000, "b": "y" * 4000})
        for _ in range(2):
            made = [await hub.sessions.create(WHO, full) for _ in range(39)]
            with pytest.raises(QuotaExceeded, match="40 sessions"):
                await hub.sessions.create(WHO, full)
            await hub.sessions.create("bob", full)
            for id in made:
                reason = m.FinishSessionRequest(reason=m.FinishReason(type="success"))
                await hub.sessions.finish(WHO, id, reason)
            with pytest.raises(QuotaExceeded):  # those that are over are still remembered
                await hub.sessions.create(WHO, full)
            database = place.folder / "manylora.db"
            store.tidying._database.give_back()
            most = database.stat().st_size
            ended = store.sessions.page(WHO).rows[0].ended_at or 0.0
            store.tidying._clock = lambda ended=ended: ended + 700.0
            place.later(SWEEP_SECONDS)
            for id in hub.sessions.open_ids():
                hub.sessions._open[id].heard_at = place.clock.now
            await place.round()
            assert store.tidying.count_sessions(WHO) == 1  # the one that is open
            assert store.sessions.page(WHO).total == 1
            assert database.stat().st_size < most - 300_000

    run(test, quotas={"sessions": 40})


def test_sampling_sessions_are_counted(run):
    async def test(place: Place) -> None:
        for seq in range(3):
            await place.ephemeral(seq + 1)
        with pytest.raises(QuotaExceeded, match="3 sampling sessions"):
            await place.hub.samplers.create(
                WHO,
                m.CreateSamplingSessionRequest(
                    session_id=place.session, sampling_session_seq_id=9, base_model="seedling"
                ),
                None,
            )

    run(test, quotas={"samplers": 3})


def test_metadata_is_bounded():
    with pytest.raises(ValueError, match=r"metadata of 20,00\d bytes; at most 16,384"):
        m.CreateSessionRequest(user_metadata={str(n): "x" * 4000 for n in range(5)})
    with pytest.raises(ValueError, match=r"metadata of 20,000 bytes; at most 16,384"):
        m.CreateSessionRequest(user_metadata={f"{n:0200}": "" for n in range(100)})
    with pytest.raises(ValueError, match="at most 16,384"):
        m.SaveWeightsRequest(
            model_id="a", seq_id=1, user_metadata={str(n): "é" * 3000 for n in "abc"}
        )


def submission(name: str, rows: int = 1) -> SubmitRunRequest:
    entry = AdapterEntry(name=name, sft=SftSettings(train="x.jsonl", max_steps=1))
    return SubmitRunRequest(
        adapter=entry, data=Data(train='{"prompt": "a", "completion": "b"}\n' * rows)
    )


def test_runs_data_are_counted_until_the_run_is_over(run):
    async def test(place: Place) -> None:
        hub = place.hub
        with pytest.raises(TooLarge, match=r"3,500 bytes, and 2,000 are allowed"):
            await hub.runs.submit(WHO, submission("a", 100))
        async with place.engine_held():
            first = await hub.runs.submit(WHO, submission("a", 50))
            with pytest.raises(QuotaExceeded, match=r"1,750 bytes, this one's 700"):
                await hub.runs.submit(WHO, submission("b", 20))
            await hub.runs.submit("bob", submission("c", 20))
        await over(place, first.id)
        await over(place, (await hub.runs.submit(WHO, submission("b", 20))).id)

    run(test, quotas={"run_data_bytes": 2000})


def test_runs_that_are_over_are_forgotten_beyond_some(run):
    async def test(place: Place) -> None:
        hub, runs = place.hub, place.hub.runs
        others = await hub.runs.submit("bob", submission("r"))
        await over(place, others.id, "bob")
        ids = []
        for number in range(4):
            ids.append((await hub.runs.submit(WHO, submission(f"r{number}"))).id)
            await over(place, ids[-1])
        await asyncio.to_thread(runs.forget_old)
        left = [row.id for row in (await hub.runs.page(WHO, 20, 0)).runs]
        assert sorted(left) == sorted(ids[2:])
        assert [row.id for row in (await hub.runs.page("bob", 20, 0)).runs] == [others.id]
        assert [runs._paths(id).root.exists() for id in ids] == [False, False, True, True]
        kept = await hub.checkpoints.page(WHO, 100, 0)
        assert len({one.tinker_path.split("/")[2] for one in kept.checkpoints}) == 4

    run(test, quotas={"runs": 2})


async def over(place: Place, id: str, tenant: str = WHO) -> None:
    """Wait for the end of a run."""
    while (now := await place.hub.runs.get(tenant, id, 0)).status in ("queued", "running"):
        await asyncio.sleep(0.05)
    assert now.status == "completed", now.error
    while place.hub.runs.count(tenant):
        await asyncio.sleep(0.01)


def test_a_session_of_which_something_is_kept_counts_as_that(run):
    async def test(place: Place) -> None:
        hub, tidying = place.hub, place.hub.resources.store.tidying
        assert tidying.count_sessions(WHO) == 1
        save = m.SaveWeightsRequest(model_id=place.model, seq_id=1, path="x")
        kept = await place.result((await hub.training.submit(WHO, save)).request_id)
        assert isinstance(kept, Ready) and tidying.count_sessions(WHO) == 0
        reason = m.FinishSessionRequest(reason=m.FinishReason(type="success"))
        await hub.sessions.finish(WHO, place.session, reason)
        await hub.resources.settle()
        tidying._clock = lambda: 1e12
        tidying.forget(600.0, 3600.0)
        assert [one.tinker_path for one in (await hub.checkpoints.page(WHO, 9, 0)).checkpoints]
        assert (await hub.training_runs.get(WHO, place.model)).training_run_id == place.model

    run(test)
