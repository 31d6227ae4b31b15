"""What a tenant holds is counted before it is spent: in a hub over a real engine."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from manylora.service.contract import Ready
from manylora.service.wire.limits import WireLimits
from manylora.service.wire.sampling import decode_sample
from tests.unit.service.test_upkeep import WHO, Place

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
        parts = place.hub.parts
        context = parts.host.engine.base.context_length
        sampler = await place.ephemeral(1)
        async with place.engine_held():
            for seq, most in enumerate((2**31 - 1, None, 5)):
                await place.hub.sample(WHO, sample(sampler, seq, max_tokens=most))
            assert parts.in_flight[WHO] == context + context + (3 + 5)
        for seq in range(3):
            assert isinstance(await place.result(f"{sampler}:{seq}"), Ready)
        # Tables of likeliest tokens are as long as the answers can become, too.
        longest = sample(sampler, 3, max_tokens=2**31 - 1, topk_sample_logprobs=2)
        id = (await place.hub.sample(WHO, longest)).request_id
        assert isinstance(await place.result(id), Ready)
        assert not parts.in_flight

    run(test)
