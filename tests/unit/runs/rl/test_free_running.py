"""Free running keeps to its capacity, trains on nothing too old, and goes on with what it began.

Faults that were planted and seen to fail here: a group more than the capacity; staleness counted
from the step's own number; the prompt of a stale group forgotten; what was cut sampled anew.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora import Trainer
from manylora.runs.rl.collecting import PromptOrder
from manylora.runs.rl.free_running import FreeCollector
from manylora.runs.rl.rl_course import RlCourse
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.runs.rl.rollout_record import RolloutRecord, read_step
from manylora.runs.run_folder import AdapterPaths
from manylora.types import RolloutFailed
from tests.unit.runs.rl.toy_runs import (
    PROMPTS,
    SPEC,
    Toy,
    drawn_by,
    make_course,
    on_base,
    plain,
    settings,
)

pytestmark = pytest.mark.usefixtures("threads")
ORDER = PromptOrder(len(PROMPTS), 0)


def group(step: int, number: int, row: int, version: int, *, samples: int = 2) -> SampleGroup:
    """A group whose answers of one token differ in their rewards."""
    segment = RolloutSegment(
        np.array([5, 6], np.int32),
        np.array([False, True]),
        np.array([0.0, -0.5], np.float32),
        np.array([-1, version], np.int32),
    )
    rollouts = tuple(Rollout(segments=(segment,), reward=float(n)) for n in range(samples))
    return SampleGroup(step=step, number=number, row=row, version=version, rollouts=rollouts)


OLD = group(3, 4, 2, 2)


class FakeVersions:
    """Only the newest version counts, and how it is named."""

    newest = 0

    def policy(self, version: int) -> int:
        assert version == self.newest
        return version


class Desk:
    """A collector of which the test says when each group is played."""

    def __init__(
        self,
        staleness: int,
        groups: int = 2,
        folder: Path | None = None,
        *,
        behind: int = 0,
        **more: Any,
    ):
        off_policy = {"max_staleness": staleness, **more.pop("off_policy", {})}
        self.rl = settings(off_policy=off_policy, groups=groups, **more)
        self.versions = FakeVersions()
        self.playing: dict[int, asyncio.Future[SampleGroup]] = {}
        self.asked: list[tuple[int, int]] = []
        self.record = None if folder is None else RolloutRecord(folder, None, behind)
        versions: Any = self.versions
        self.collector = FreeCollector(
            self.rl, self.play, lambda one: len(one.rollouts) > 0, versions, self.record, ORDER
        )

    async def play(self, step: int, number: int, row: int, policy: Any) -> SampleGroup:
        self.asked.append((number, row))
        self.playing[number] = asyncio.get_running_loop().create_future()
        try:
            made = await self.playing[number]
        finally:
            del self.playing[number]
        return group(step, number, row, policy) if made is None else made

    async def close(self) -> None:
        await self.collector.close()
        if self.record is not None:
            self.record.close()

    async def finish(self, *numbers: int) -> None:
        for number in numbers:
            playing: Any = self.playing[number]
            playing.set_result(None)
        await settled()


def run(play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine; one that waits for ever is a failure."""
    asyncio.run(asyncio.wait_for(play(), 60))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("staleness", "groups"), [(0, 2), (1, 3), (4, 2)])
def test_the_capacity_is_areals(staleness: int, groups: int):
    """At version v, (m + v + 1) · groups less what was trained, is ready or is running."""

    async def play() -> None:
        desk = Desk(staleness, groups)
        desk.collector.begin(1, {})
        for step in range(1, 5):
            desk.versions.newest = version = step - 1
            desk.collector.launch(step)
            await settled()
            assert len(desk.asked) == (staleness + version + 1) * groups
            taking = asyncio.create_task(desk.collector.take(step))
            await desk.finish(*sorted(desk.playing)[-groups:])
            collected = await taking
            assert [one.step for one in collected.groups] == [step] * groups or staleness
            assert len(collected.groups) == groups
        await desk.collector.close()
        assert not desk.playing

    run(play)


def test_no_more_are_in_the_making_than_a_run_allows():
    async def play() -> None:
        desk = Desk(4, 2, off_policy={"max_concurrent": 3})
        desk.collector.begin(1, {})
        desk.collector.launch(1)
        await settled()
        assert len(desk.playing) == 3
        taking = asyncio.create_task(desk.collector.take(1))
        await desk.finish(0)
        assert (len(desk.playing), len(desk.asked)) == (3, 4)
        await desk.finish(1)
        await taking
        await desk.collector.close()

    run(play)


def test_what_has_become_too_old_is_dropped_and_its_prompt_asked_again():
    """Two further groups are ready at version 0; with m = 1 they may go into steps 1 and 2."""

    async def play() -> None:
        desk = Desk(1, 2)
        desk.collector.begin(1, {})
        desk.collector.launch(1)
        await settled()
        assert desk.asked == list(enumerate(ORDER.rows(0, 4)))
        await desk.finish(0, 1)
        first = await desk.collector.take(1)
        assert [one.number for one in first.groups] == [0, 1]
        # Those of step 2 come from the newer version; the two of version 0 stay slow.
        desk.versions.newest = 1
        desk.collector.launch(2)
        await settled()
        await desk.finish(4, 5)
        second = await desk.collector.take(2)
        assert [one.number for one in second.groups] == [4, 5]
        assert desk.collector.oldest(2) == 0
        desk.versions.newest = 2
        desk.collector.launch(3)
        await settled()
        taking = asyncio.create_task(desk.collector.take(3))
        await desk.finish(2, 3)
        # Version 0 is two behind: dropped, and the same prompts are asked again, of version 2.
        assert not taking.done()
        stale = [row for number, row in desk.asked if number in (2, 3)]
        assert [row for number, row in desk.asked if number > 7] == stale
        await desk.finish(*sorted(desk.playing))
        third = await taking
        assert third.dropped == 2
        assert all(2 - one.oldest <= 1 for one in third.groups)
        await desk.collector.close()

    run(play)


def test_groups_without_a_difference_do_not_keep_a_step_waiting_for_ever():
    """After as many as the waves would have asked, it trains with what it has, or with nothing."""

    async def play() -> None:
        desk = Desk(1, 2, dynamic_sampling={"on": True, "most_waves": 2})
        desk.collector._teaches = lambda one: one.number == 1
        desk.collector.begin(1, {})
        taking = asyncio.create_task(desk.collector.take(1))
        await settled()
        while not taking.done():
            await desk.finish(min(desk.playing))
        collected = taking.result()
        assert [one.number for one in collected.groups] == [1]
        assert [one.number for one in collected.others] == [0, 2, 3, 4]
        assert collected.dropped == 0
        await desk.collector.close()

    run(play)


def test_what_a_player_raises_ends_the_step():
    async def play() -> None:
        desk = Desk(0, 2)
        desk.collector.begin(1, {})
        taking = asyncio.create_task(desk.collector.take(1))
        await settled()
        desk.playing[1].set_exception(RolloutFailed("the hook is gone"))
        with pytest.raises(RolloutFailed, match="the hook is gone"):
            await taking
        await desk.collector.close()

    run(play)


def test_a_resumed_run_has_what_was_ready_and_asks_what_was_running(tmp_path: Path):
    async def play() -> None:
        desk = Desk(2, 2, tmp_path)
        desk.collector.begin(1, {})
        desk.collector.launch(1)
        await settled()
        await desk.finish(3, 0, 1)
        first = await desk.collector.take(1)
        assert [one.number for one in first.groups] == [3, 0]
        memory = plain(desk.collector.memory(1))
        running = [row for number, row in desk.asked if number not in (0, 1, 3)]
        assert (memory["place"], memory["number"], memory["again"]) == (6, 6, running)
        assert [SampleGroup.of_json(one).number for one in memory["ready"]] == [1]
        # The next step begins, and has a group of its own, which is on the disk.
        desk.versions.newest = 1
        desk.collector.launch(2)
        await settled()
        await desk.finish(6)
        await desk.close()

        again = Desk(2, 2, tmp_path, behind=1)
        again.versions.newest = 1
        again.collector.begin(2, memory)
        second = await again.collector.take(2)
        assert [one.number for one in second.groups] == [1, 6]
        again.collector.launch(2)
        await settled()
        # Eight may be ahead of version 1; two were trained on before, and two are now.
        assert again.asked[: len(running)] == list(enumerate(running, start=7))
        await again.close()

    run(play)


def test_what_was_ready_may_be_too_old_when_it_is_found(tmp_path: Path):
    async def play() -> None:
        desk = Desk(1, 1, tmp_path, behind=4)
        desk.versions.newest = 4
        desk.collector.begin(5, {"place": 5, "number": 5, "ready": [plain(OLD.to_json())]})
        taking = asyncio.create_task(desk.collector.take(5))
        await settled()
        assert desk.asked[0] == (5, OLD.row)
        await desk.finish(5)
        assert (await taking).dropped == 1
        await desk.close()

    run(play)


def test_a_real_course_never_trains_on_what_is_too_old(tiny: Callable[[str], Path], tmp_path: Path):
    rl = settings(off_policy={"max_staleness": 1}, max_steps=8)
    courses: list[RlCourse] = []
    most: list[int] = []

    def watch() -> None:
        """Called for each group that begins, before it is counted."""
        collector: Any = courses[0]._collector
        limit = (1 + courses[0]._versions.newest + 1) * rl.groups
        most.append(limit - collector._trained - len(collector._ready) - len(collector._running))

    # Each third answer is slow, so that steps overtake it.
    toy = Toy(rl, delay=lambda step, number, sample: 0.15 * (number % 3 == 0), watch=watch)

    async def play(trainer: Trainer) -> None:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        courses.append(make_course(trainer, toy))
        course, paths = courses[0], AdapterPaths(tmp_path)
        await course.begin(adapter, paths, 0, {})
        made = [(await course.start(adapter, step).read()).figures for step in range(1, 9)]
        await course.end()
        assert max(one["staleness_max"] for one in made) <= 1
        trained: Counter[int] = Counter()
        for step in range(1, 9):
            for one in read_step(paths.rollouts, step):
                trained[one["group"]] += one["advantages"] is not None
                versions = [
                    v for r in one["rollouts"] for s in r["segments"] for v in s["versions"]
                ]
                assert step - 1 - min(versions) <= 1
        assert sum(trained.values()) == 8 * rl.groups
        assert max(trained.values()) == 1

    on_base(tiny("llama"), play)
    assert min(most) >= 0


def test_an_answer_that_is_cut_goes_on_under_newer_weights(
    tiny: Callable[[str], Path], tmp_path: Path
):
    """Row 0's are long and the others short, so that a publish finds them in the making."""
    rl = settings(
        off_policy={"max_staleness": 6, "interrupt": True},
        max_steps=4,
        groups=2,
        group_size=2,
        sampling={"max_tokens": 120, "stop": [], "temperature": 1.3},
    )
    others = {row: 3 for row in range(len(PROMPTS)) if row}
    toy = Toy(rl, longest=others, reward=lambda row, tokens: float(sum(tokens)))

    async def play(trainer: Trainer) -> None:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        course, paths = make_course(trainer, toy), AdapterPaths(tmp_path)
        await course.begin(adapter, paths, 0, {})
        weights, step = [adapter.snapshot()], 0
        mixed: list[RolloutSegment] = []
        while not mixed and step < 40:
            step += 1
            await course.start(adapter, step).read()
            weights.append(adapter.snapshot())
            for one in read_step(paths.rollouts, step):
                segments = [
                    RolloutSegment.of_json(s) for r in one["rollouts"] for s in r["segments"]
                ]
                for segment in segments:
                    versions = segment.versions[segment.sampled]
                    assert len(versions) == (120 if one["row"] == 0 else 3)
                    assert (np.diff(versions) >= 0).all()
                    if versions[0] < versions[-1]:
                        mixed.append(segment)
        await course.end()
        assert mixed
        # Each token's log-probability is that of the weights whose version it carries.
        for segment in mixed:
            versions = segment.versions[segment.sampled]
            q = segment.logprobs[segment.sampled]
            assert len(set(versions.tolist())) > 1
            for version in set(versions.tolist()):
                (found,) = drawn_by(weights[version], [segment], 1.3)
                own = versions == version
                assert np.abs(found - q)[own].max() < 1e-4
                assert np.abs(found - q)[~own].max() > 1e-2

    on_base(tiny("llama"), play)
