"""What waits is as large as it came; it is decoded in its turn, and counted before that."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.service.contract import Failed, Ready, Waiting
from manylora.service.http_errors import Backpressure, NotFound, TooLarge
from manylora.service.state.ledger import Ledger
from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.outline import Outline, outline_of
from manylora.service.wire.sample_messages import read_sample
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import Cancelled, DataError
from tests.unit.service import bodies
from tests.unit.service.test_maintenance import WHO, Place

LIMITS = WireLimits()
LENGTH, COLUMNS = 64, 1024


def expanding(place: Place, seq: int, length: int = LENGTH) -> Outline:
    """A forward_backward that becomes some thousand times as large when it is decoded."""
    shape, crow = (length, COLUMNS), list(range(length + 1))
    ids = [(seq + n) % 50 for n in range(length)]
    inputs = {
        "target_tokens": bodies.sparse(shape, crow, [0] * length, ids, pb.DTYPE_INT64),
        "weights": bodies.sparse(shape, crow, [0] * length, [1.0] * length),
    }
    message = bodies.request(
        [bodies.datum([bodies.tokens(*ids)], inputs)], model_id=place.model, seq_id=seq
    )
    return outline_of(message.SerializeToString(), LIMITS)


async def send(place: Place, outline: Outline, tenant: str = WHO) -> str:
    return (await place.hub.training.forward_backward(tenant, outline)).request_id


def opened(
    tmp_path: Path, test: Callable[[Place], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    async def whole() -> None:
        place = Place(tmp_path / "data", **settings)
        async with place.open():
            await place.begin()
            await test(place)

    asyncio.run(whole())


# --- the size, from what came -------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 60), st.booleans()), min_size=1, max_size=5
    )
)
def test_what_is_counted_is_what_it_takes(shapes: list[tuple[int, int, bool]]):
    data: list[pb.Datum] = []
    for length, columns, is_sparse in shapes:
        ids = [1] * length
        if is_sparse:
            crow = list(range(length + 1))
            inputs = {
                "target_tokens": bodies.sparse(
                    (length, columns), crow, [0] * length, ids, pb.DTYPE_INT64
                ),
                "weights": bodies.sparse((length, columns), crow, [0] * length, [1.0] * length),
            }
        else:
            inputs = {
                "target_tokens": bodies.dense(ids),
                "weights": bodies.dense([1.0] * length),
            }
        data.append(bodies.datum([bodies.tokens(*ids)], inputs))
    outline = outline_of(bodies.request(data).SerializeToString(), LIMITS)
    submit = outline.decode()
    taken = sum(
        datum.tokens.nbytes + sum(array.nbytes for array in datum.loss_inputs.values())
        for datum in submit.data
    )
    assert outline.num_tokens == submit.num_tokens
    assert taken <= outline.decoded_bytes <= taken + 1000 * len(data)
    assert (outline.digest, outline.body) == (submit.digest, submit.body)


# --- behind a gap -------------------------------------------------------------------------------


def test_behind_a_gap_it_stays_as_it_came(tmp_path: Path):
    """And when the gap fills, no more is decoded at once than may be, in order."""

    async def test(place: Place) -> None:
        resources, each = place.hub.resources, expanding(place, 2).decoded_bytes
        assert each > 100 * len(expanding(place, 2).body)
        waiting = {seq: expanding(place, seq) for seq in (2, 3, 4, 6, 7, 8)}
        ids = [await send(place, outline) for outline in waiting.values()]
        ids.append(await place.step(5))
        model = await place.hub.adapters.require(WHO, place.model)
        for _, request in model.order.early():
            assert request.kind.name == "optim_step" or isinstance(request.content, Outline)
        assert resources.decoded.held(WHO) == 0
        bodies_held = sum(len(outline.body) for outline in waiting.values())
        assert bodies_held < resources.waiting.held(WHO) < bodies_held + 1000
        most, take = 0, resources.decoded.take

        def watched(tenant: str, size: int) -> None:
            nonlocal most
            take(tenant, size)
            most = max(most, resources.decoded.total)

        resources.decoded.take = watched  # type: ignore[method-assign]
        ids.append(await send(place, expanding(place, 1)))
        outcomes = [await place.result(id) for id in ids]
        assert all(isinstance(outcome, Ready) for outcome in outcomes)
        assert each <= most <= 2.5 * each
        assert model.order.next_seq == 9
        await asyncio.sleep(0.05)
        assert (resources.decoded.total, resources.waiting.total, resources.in_flight) == (0, 0, {})
        assert (model.running, model.feeding) == (0, None)

    quota = int(2.5 * (LENGTH * COLUMNS * 12 + 2000))
    opened(tmp_path, test, quotas={"decoded_bytes": quota})


def test_order_and_bits_are_those_of_requests_that_came_in_order(tmp_path: Path):
    async def outcomes(place: Place, order: list[int]) -> list[Any]:
        ids = {}
        for seq in order:
            ids[seq] = (
                await place.step(seq) if seq % 3 == 0 else await send(place, expanding(place, seq))
            )
        return [await place.result(ids[seq]) for seq in sorted(ids)]

    found = []
    for number, order in enumerate(([1, 2, 3, 4, 5, 6, 7], [7, 3, 2, 6, 5, 4, 1])):

        async def test(place: Place, order: list[int] = order) -> None:
            found.append(await outcomes(place, order))

        opened(tmp_path / str(number), test, quotas={"decoded_bytes": 1_200_000})
    assert found[0] == found[1]
    assert all(isinstance(outcome, Ready) for outcome in found[0])


def test_after_a_restart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = Place(tmp_path / "data", quotas={"decoded_bytes": 1_200_000})
    decoded: list[int] = []
    decode = Outline.decode
    monkeypatch.setattr(
        Outline, "decode", lambda self: (decoded.append(self.seq_id), decode(self))[1]
    )

    async def whole() -> None:
        async with place.open():
            await place.begin()
            for seq in (2, 3, 4):
                await send(place, expanding(place, seq))
            assert decoded == []
        async with place.open():
            resources = place.hub.resources
            assert (decoded, resources.decoded.total) == ([], 0)
            held = resources.waiting.held(WHO)
            assert held == sum(len(expanding(place, seq).body) for seq in (2, 3, 4))
            await send(place, expanding(place, 1))
            for seq in (1, 2, 3, 4):
                assert isinstance(await place.result(f"{place.model}:{seq}"), Ready)
            assert decoded == [1, 2, 3, 4]

    asyncio.run(whole())


def wrong(place: Place, seq: int) -> Outline:
    """One that cannot be decoded: more targets than tokens."""
    data = [bodies.datum([bodies.tokens(1, 2)], {"target_tokens": bodies.dense([1, 2, 3])})]
    message = bodies.request(data, model_id=place.model, seq_id=seq)
    return outline_of(message.SerializeToString(), LIMITS)


def test_what_is_wrong_in_its_turn_is_refused_at_once_and_holds_nothing(tmp_path: Path):
    async def test(place: Place) -> None:
        resources = place.hub.resources
        with pytest.raises(DataError, match=r"data\[0\]"):
            await send(place, wrong(place, 1))
        assert isinstance(await place.result(f"{place.model}:1"), Failed)
        assert resources.decoded.total == resources.waiting.total == 0 and not resources.in_flight
        assert isinstance(await place.result(await place.data(2)), Ready)

    opened(tmp_path, test)


def test_what_is_wrong_behind_a_gap_fails_in_its_turn(tmp_path: Path):
    async def test(place: Place) -> None:
        bad = await send(place, wrong(place, 2))
        assert isinstance(await place.hub.outcome(WHO, bad, 0.05), Waiting)
        await send(place, expanding(place, 1))
        outcome = await place.result(bad)
        assert isinstance(outcome, Failed) and "data[0]" in outcome.error
        assert isinstance(await place.result(await place.step(3)), Failed)
        assert isinstance(await place.result(await place.data(4)), Ready)
        assert place.hub.resources.decoded.total == 0

    opened(tmp_path, test)


# --- before it is decoded -----------------------------------------------------------------------


def test_owner_and_quota_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def test(place: Place) -> None:
        resources = place.hub.resources
        with monkeypatch.context() as patched:
            patched.setattr(Outline, "decode", lambda self: pytest.fail("it was decoded"))
            with pytest.raises(NotFound):
                await send(place, expanding(place, 1), "bob")
            with pytest.raises(TooLarge, match=r"needs [\d,]+ bytes .* and 1,200,000 are allowed"):
                await send(place, expanding(place, 1, 2 * LENGTH))
            resources.decoded.take(WHO, 1_000_000)
            second = await send(place, expanding(place, 2))  # taken, and decoded when there is room
            assert isinstance(await place.hub.outcome(WHO, second, 0.05), Waiting)
            resources.waiting.take(WHO, 100_000_000)
            with pytest.raises(Backpressure, match="bytes of requests"):
                await send(place, expanding(place, 3))
            resources.waiting.leave(WHO, 100_000_000)
        resources.decoded.leave(WHO, 1_000_000)
        assert isinstance(await place.result(second), Ready)
        # The one that never fits has used its number up; the one that fits later has not.
        assert isinstance(await place.result(f"{place.model}:1"), Failed)
        assert isinstance(await place.result(await send(place, expanding(place, 3))), Ready)
        assert not resources.in_flight and resources.waiting.total == resources.decoded.total == 0

    quotas = {"decoded_bytes": 1_200_000, "waiting_bytes": 100_000_000}
    opened(tmp_path, test, quotas=quotas)


def candidates(sampler: str, seq: int, columns: int):
    """A sample whose candidates are a few numbers, and a table once they are unpacked."""
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [7, 8, 9]}]},
        "sampling_params": {"max_tokens": 1, "seed": 1},
        "target_prompt_logprobs": {
            "data": [5], "shape": [2, columns], "dtype": "int64",
            "sparse_crow_indices": [0, 1, 1], "sparse_col_indices": [0],
        },
    }  # fmt: skip
    return read_sample(json.dumps(body).encode(), LIMITS)


def test_a_samples_candidates_are_counted_before_they_are_unpacked(tmp_path: Path):
    async def test(place: Place) -> None:
        resources, size = place.hub.resources, 3 * 8 + 2 * 1000 * 8
        sampler = await place.ephemeral(1)
        assert candidates(sampler, 0, 1000).packed is not None
        async with place.engine_held():
            ids = [(await place.hub.samplers.sample(WHO, candidates(sampler, 0, 1000))).request_id]
            assert resources.decoded.held(WHO) == size
            with pytest.raises(Backpressure):
                await place.hub.samplers.sample(WHO, candidates(sampler, 1, 1000))
            ids.append((await place.hub.samplers.sample(WHO, candidates(sampler, 2, 1))).request_id)
            with pytest.raises(TooLarge, match="16,100 are allowed"):
                await place.hub.samplers.sample(WHO, candidates(sampler, 3, 1024))
        for id in ids:
            assert isinstance(await place.result(id), Ready)
        assert resources.decoded.total == resources.waiting.total == 0 and not resources.in_flight

    opened(tmp_path, test, quotas={"decoded_bytes": 16_100})


# --- the ledger ---------------------------------------------------------------------------------


def test_a_ledger_lets_everybody_in_in_turn():
    async def whole() -> None:
        ledger = Ledger("things", 10, 15)
        ledger.enter("ann", 8)
        with pytest.raises(Backpressure, match="your requests hold 8"):
            ledger.enter("ann", 3)
        ledger.enter("bob", 6)
        with pytest.raises(Backpressure, match="the server's 15"):
            ledger.enter("cat", 2)
        with pytest.raises(TooLarge, match="needs 11 bytes of things, and 10 are allowed"):
            ledger.enter("cat", 11)
        entered: list[str] = []

        async def come(name: str, size: int) -> None:
            await ledger.enter_in_turn(name, size)
            entered.append(f"{name}{size}")

        tasks = [asyncio.create_task(come(*who)) for who in (("ann", 9), ("cat", 4), ("dan", 3))]
        await asyncio.sleep(0)
        assert not ledger.fits("eve", 1)  # there is room for it, but others came first
        ledger.leave("bob", 2)
        await asyncio.sleep(0)
        assert entered == []  # room for dan, who came after cat
        ledger.leave("bob", 4)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert entered == ["cat4", "dan3"]  # ann waits for what she holds herself
        ledger.leave("ann", 8)
        ledger.leave("cat", 4)
        await asyncio.gather(*tasks)
        assert entered[-1] == "ann9" and ledger.total == 12
        last = asyncio.create_task(come("ann", 9))
        await asyncio.sleep(0)
        ledger.close()
        with pytest.raises(Cancelled):
            await last

    asyncio.run(whole())
