"""A stop's moments, and a process that would not end by itself."""

import asyncio
import subprocess
import sys
import time

import pytest

from manylora.service.contract import Waiting
from manylora.service.http_errors import NotReady
from manylora.service.hub_proxy import HubProxy
from manylora.service.shutdown import LAST_SECONDS, SAVING_SECONDS, Ending
from tests.unit.service.fake_hub import FakeHub


def test_the_first_request_counts_and_a_second_signal_drains_no_longer() -> None:
    ending, before = Ending(1000.0), time.monotonic()
    ending.ask()
    after = time.monotonic()
    assert before + 1000.0 <= ending.drained <= after + 1000.0
    assert ending.saved == ending.drained + SAVING_SECONDS
    assert ending.over == ending.drained + LAST_SECONDS
    drained = ending.drained
    ending.ask()
    assert ending.drained == drained
    ending.hurry()
    assert before <= ending.drained <= after


# What it writes to is full, and nobody reads it; its exit waits for a thread that does not end.
HANGING = """
import os, sys, threading, time
from manylora.service import shutdown as ending
ending.LAST_SECONDS = 0.5
os.set_blocking(2, False)
try:
    while True: os.write(2, b"." * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
one = ending.Ending(0.0)
one.enforce()
one.ask(status=int(sys.argv[1]))
threading.Thread(target=time.sleep, args=(600,)).start()
"""


@pytest.mark.parametrize("status", [0, 1])
def test_a_process_that_hangs_is_broken_off(status: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGING, str(status)], stderr=subprocess.PIPE)
    try:
        assert process.wait(120) == status
    finally:
        process.kill()
        assert process.stderr is not None
        process.stderr.close()


def test_a_hub_is_not_settled_while_a_request_is_inside() -> None:
    async def scenario() -> None:
        hub = HubProxy(FakeHub())
        async with hub.entered():
            hub.depart()
            settling = asyncio.create_task(hub.settle())
            await asyncio.sleep(0.01)
            assert not settling.done()
        await settling

    asyncio.run(asyncio.wait_for(scenario(), 20.0))


def test_who_waits_for_the_engine_is_let_go() -> None:
    async def scenario() -> None:
        hub = HubProxy()

        async def ask() -> None:
            async with hub.entered() as entered:
                await entered.capabilities("t")

        waiting = asyncio.create_task(ask())
        polling = asyncio.create_task(hub.outcome("t", "r", 1.0))
        await asyncio.sleep(0)
        hub.close()
        with pytest.raises(NotReady, match="stopping"):
            await waiting
        assert isinstance(await polling, Waiting)
        assert not hub.ready()
        with pytest.raises(NotReady, match="stopping"):
            await ask()

    asyncio.run(asyncio.wait_for(scenario(), 20.0))
