"""Many clients that wait cost nothing, and many requests leave nothing behind.

Times are for `python -m benchmarks.service`; here is what holds on a busy machine, too.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.service_load import Client, idle_pollers, latencies, memory, tokens
from tests.wire.server import Server

# Anonymous memory that a request may leave behind: its result waits in memory for a while, and its
# name for its model's end.
BYTES_PER_REQUEST = 1500


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own: polls that another test has left count against their tenant for
    as long as they are held."""
    with Server(tmp_path) as server:
        yield server


def test_five_hundred_who_wait_are_no_load(loaded: Server):
    found = asyncio.run(latencies(loaded, pollers=500, rounds=3, steps=4))
    with_them, without = found["cpu_ms_per_step"], found["cpu_ms_per_step_without_pollers"]
    # The least of the rounds: what else the machine does only adds.
    assert with_them["p10"] < 1.3 * without["p10"], found


def test_polls_are_held_and_answered_at_once(loaded: Server):
    """Five hundred polls wait; one operation that fills the gap lets all of them go."""

    async def work() -> None:
        owner = Client(loaded)
        await owner.open(rank=1)
        owner.seq = 1
        ids = [await owner.step() for _ in range(500)]
        waiting = [Client(loaded) for _ in ids]
        polls = [
            asyncio.create_task(client.result(id)) for client, id in zip(waiting, ids, strict=True)
        ]
        done, _ = await asyncio.wait(polls, timeout=2.0)
        assert not done
        owner.seq = 0
        await owner.data(tokens(8))
        await asyncio.wait_for(asyncio.gather(*polls, return_exceptions=True), 60.0)
        assert all(poll.exception() is None for poll in polls)
        for client in (owner, *waiting):
            client.connection.close()

    asyncio.run(work())


def test_pollers_that_vanish_are_forgotten(loaded: Server):
    async def work() -> int:
        tasks = await idle_pollers(loaded, 200)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1.0)
        return len(list(Path(f"/proc/{loaded.pid}/fd").iterdir()))

    before = asyncio.run(work())
    assert asyncio.run(work()) <= before + 10


def test_memory_stays_as_it_is(loaded: Server):
    bound = 2 * BYTES_PER_REQUEST
    found = asyncio.run(memory(loaded, 1500))
    if found["growth_bytes_per_request"] >= bound:
        # What leaks grows again. A batch of more models than any before it takes its room once.
        found = asyncio.run(memory(loaded, 1500))
    assert found["growth_bytes_per_request"] < bound, found


@pytest.mark.slow
def test_memory_stays_as_it_is_over_twenty_thousand_requests(loaded: Server):
    found = asyncio.run(memory(loaded, 20_000))
    assert found["growth_bytes_per_request"] < BYTES_PER_REQUEST, found
