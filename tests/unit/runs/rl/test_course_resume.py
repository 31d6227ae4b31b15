"""A course that is left and taken up again ends with the same bits, wherever that was.

Faults that were planted and seen to fail here: the versions of the window not kept; the prompts'
place of the next step forgotten; groups on the disk sampled again; the reference taken
from the weights as they are; a step that is left raises what cancelled it.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from manylora import Trainer
from manylora.runs.run_folder import AdapterPaths
from manylora.types import CheckpointDamaged
from tests.unit.runs.rl.toy_runs import (
    SPEC,
    Ended,
    Toy,
    ended,
    low,
    make_course,
    on_base,
    plain,
    run_toy,
    settings,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("threads")
LAW: dict[str, dict[str, Any]] = {
    "synchronous": {"off_policy": {"lag": 0}},
    "one behind": {"off_policy": {"lag": 1}, "loss": {"updates": 2}},
    "three behind": {"off_policy": {"lag": 3, "correct": "token_mask"}},
    "waves": {
        "off_policy": {"lag": 2},
        "dynamic_sampling": {"on": True, "most_waves": 3},
    },
    "start": {"off_policy": {"lag": 0}, "kl": {"coef": 0.3, "reference": "start"}},
}


def some(row: int, tokens: Sequence[int]) -> float:
    """Two prompts of five teach, so that waves are needed and a step has prompts of its own."""
    return low(row, tokens) if row in (1, 3) else 0.5


async def left_and_resumed(trainer: Trainer, folder: Path, toy: Toy, at: int) -> Ended:
    """Train `at` steps, save, leave in the middle of the next, and go on as a new run would."""
    paths, saved = AdapterPaths(folder), folder / "left"
    adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
    course = make_course(trainer, toy)
    await course.begin(adapter, paths, 0, {})
    made = await steps_of(course, adapter, 1, at)
    memory = plain(course.memory())
    await course.keep()
    await asyncio.wrap_future(adapter.save(saved))
    # The next step is in the making when the run is asked to stop, or killed.
    asked = len(toy.asked)
    if at + 1 <= course.steps:
        next_step = course.start(adapter, at + 1)
        while len(toy.asked) == asked and not next_step.task.done():
            await asyncio.sleep(0.001)
        if not next_step.training.is_set():
            assert next_step.give_up()
        await next_step.settle()
    await course.end()
    await asyncio.wrap_future(adapter.unload())

    adapter, _ = await asyncio.to_thread(trainer.restore, "toy", saved)
    course = make_course(trainer, toy)
    await course.begin(adapter, paths, at, memory)
    made += await steps_of(course, adapter, at + 1, course.steps)
    await course.end()
    found = await ended(adapter, paths, made)
    await asyncio.wrap_future(adapter.unload())
    return found


@pytest.mark.parametrize("name", LAW)
def test_a_course_that_is_taken_up_again_ends_with_the_same_bits(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
):
    rl = settings(**LAW[name], max_steps=5)

    async def play(trainer: Trainer) -> None:
        whole = await run_toy(trainer, tmp_path / "whole", Toy(rl, reward=some))
        for at in (1, 3):
            toy = Toy(rl, reward=some, delay=lambda step, number, sample: 0.01 * number)
            found = await left_and_resumed(trainer, tmp_path / str(at), toy, at)
            whole.same(found)

    on_base(tiny("llama"), play)


def test_a_group_that_was_scored_is_not_asked_again(tiny: Callable[[str], Path], tmp_path: Path):
    """The first group of each step is there before the second, whose scoring the run's end cuts."""
    rl = settings(off_policy={"lag": 1}, max_steps=4)
    toy = Toy(rl, delay=lambda step, number, sample: 0.3 * number)
    scored: Counter[tuple[int, int]] = Counter()

    async def play(trainer: Trainer) -> None:
        paths = AdapterPaths(tmp_path)
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        await asyncio.wrap_future(adapter.save(tmp_path / "left"))
        course = make_course(trainer, toy)
        await course.begin(adapter, paths, 0, {})
        step = course.start(adapter, 1)
        while toy.ended < 2:
            await asyncio.sleep(0.001)
        assert step.give_up()
        await step.settle()
        await course.end()
        scored.update((one[0], one[1]) for one in toy.finished)
        assert scored == {(1, 0): 4, (2, 0): 4}
        course = make_course(trainer, toy)
        await course.begin(adapter, paths, 0, {})
        await steps_of(course, adapter, 1, 4)
        await course.end()

    on_base(tiny("llama"), play)
    found = Counter((step, number) for step, number, _ in toy.finished)
    assert found == {(step, number): 4 for step in range(1, 5) for number in (0, 1)}


def test_a_step_that_trains_is_not_left(tiny: Callable[[str], Path]):
    async def play(trainer: Trainer) -> None:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        course = make_course(trainer, Toy(settings()))
        await course.begin(adapter, None, 0, {})
        step = course.start(adapter, 1)
        assert step.give_up()
        await step.training.wait()
        assert not step.give_up()
        assert (await step.read()).figures["grad_norm"] > 0
        await course.end()

    on_base(tiny("llama"), play)


def test_the_start_is_where_the_adapter_began(tiny: Callable[[str], Path], tmp_path: Path):
    """At a warm start the pull to the start is nothing, and that to the base is not."""

    async def play(trainer: Trainer) -> None:
        warm = await asyncio.to_thread(trainer.create, "warm", SPEC)
        course = make_course(trainer, Toy(settings(off_policy={"lag": 0})))
        await course.begin(warm, None, 0, {})
        await steps_of(course, warm, 1, 3)
        await course.end()
        await asyncio.wrap_future(warm.export(tmp_path / "warm"))
        pull: dict[str, list[float]] = {}
        for reference in ("start", "base"):
            own = await asyncio.to_thread(trainer.create, reference, init_from=tmp_path / "warm")
            kl = {"coef": 0.2, "reference": reference}
            course = make_course(trainer, Toy(settings(off_policy={"lag": 0}, kl=kl)))
            await course.begin(own, None, 0, {})
            made = await steps_of(course, own, 1, 3)
            pull[reference] = [one.figures["kl"] for one in made]
            # It is kept, however far the window has moved on.
            assert (0 in course._versions._policies) == (reference == "start")
            await course.end()
        assert pull["start"][0] < 1e-6
        assert pull["base"][0] > 1e-3
        assert pull["start"][2] > 1e-5

    on_base(tiny("llama"), play)


def test_a_course_that_cannot_begin_lets_go_of_its_players(tiny: Any, tmp_path: Path) -> None:
    """As when the versions that a training state needs have been deleted."""
    toy = Toy(settings(off_policy={"lag": 2}))

    async def play(trainer: Trainer) -> None:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        course = make_course(trainer, toy)
        with pytest.raises(CheckpointDamaged, match="version-1"):
            await course.begin(adapter, AdapterPaths(tmp_path), 3, {})
        assert not toy.closed
        await course.end()

    on_base(tiny("llama"), play)
    assert toy.closed
