"""Groups that teach nothing are replaced, wave by wave, and what is lost is told.

Faults that were planted and seen to fail here: the next step's prompts begin where this step's
would without waves; a later wave asks the newest version; the counter of silent steps is not kept.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from manylora import AdapterHandle, Trainer
from manylora.runs.rl.collecting import PromptOrder
from manylora.runs.rl.rl_course import MOST_SILENT_STEPS, RlCourse
from manylora.runs.rl.rollout_record import read_step
from manylora.runs.run_folder import AdapterPaths
from manylora.types import RolloutFailed
from tests.unit.runs.rl.toy_runs import (
    PROMPTS,
    SPEC,
    Toy,
    low,
    make_course,
    on_base,
    plain,
    settings,
)

pytestmark = pytest.mark.usefixtures("threads")
ORDER = PromptOrder(len(PROMPTS), 0)
Step = Callable[[int], Any]


def silent(row: int, tokens: Sequence[int]) -> float:
    """All answers are alike."""
    return 0.25


def only(*rows: int) -> Callable[[int, Sequence[int]], float]:
    """Answers to these prompts differ, those to others never do."""
    return lambda row, tokens: low(row, tokens) if row in rows else 0.0


def with_course(
    base: Path,
    toy: Toy,
    play: Callable[[RlCourse, AdapterHandle], Any],
    folder: Path | None = None,
    memory: Mapping[str, Any] | None = None,
) -> Any:
    """Run a coroutine with a course that has begun, on an adapter of its own."""

    async def whole(trainer: Trainer) -> Any:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        course = make_course(trainer, toy)
        await course.begin(
            adapter, None if folder is None else AdapterPaths(folder), 0, memory or {}
        )
        try:
            return await play(course, adapter)
        finally:
            await course.end()

    return on_base(base, whole)


async def figures_of(course: RlCourse, adapter: AdapterHandle, steps: int) -> list[dict[str, Any]]:
    return [(await course.start(adapter, step).read()).figures for step in range(1, steps + 1)]


@pytest.mark.parametrize("lag", [0, 1])
def test_further_prompts_are_asked_of_the_same_version_in_order(
    tiny: Callable[[str], Path], tmp_path: Path, lag: int
):
    """Rows 1 and 3 of five teach; the cursor goes on behind the waves."""
    rl = settings(
        dynamic_sampling={"on": True, "most_waves": 8}, off_policy={"lag": lag}, max_steps=4
    )
    toy = Toy(rl, reward=only(1, 3))
    made = with_course(
        tiny("llama"), toy, lambda course, adapter: figures_of(course, adapter, 4), tmp_path
    )
    place = 0
    for step, figures in enumerate(made, start=1):
        asked = [one[1:] for one in sorted(toy.asked) if one[0] == step]
        # By hand: two at first, then as many as are missing.
        expected: list[int] = []
        teaching = waves = 0
        while teaching < 2:
            rows = ORDER.rows(place, 2 - teaching)
            teaching += sum(row in (1, 3) for row in rows)
            expected += rows
            place, waves = place + len(rows), waves + 1
        assert [row for _, row, _ in asked] == expected
        assert [number for number, _, _ in asked] == [*range(len(expected))]
        assert {version for *_, version in asked} == {max(0, step - 1 - lag)}
        assert (figures["waves"], figures["groups"]) == (waves, 2)
        assert figures["zero_variance_groups"] == len(expected) - 2
        kept = read_step(AdapterPaths(tmp_path).rollouts, step)
        trained = [one for one in kept if one["advantages"] is not None]
        assert [one["row"] for one in trained] == [row for row in expected if row in (1, 3)]
        assert len(kept) == len(expected)


def test_after_the_last_wave_it_trains_with_what_it_has(tiny: Callable[[str], Path]):
    rl = settings(groups=3, dynamic_sampling={"on": True, "most_waves": 2}, max_steps=1)
    first = ORDER.rows(0, 3)[1]
    toy = Toy(rl, reward=only(first))
    (figures,) = with_course(
        tiny("llama"), toy, lambda course, adapter: figures_of(course, adapter, 1)
    )
    # Three prompts, then two more; one of them all teaches.
    assert (figures["waves"], figures["groups"], len(toy.asked)) == (2, 1, 5)
    assert figures["zero_variance_groups"] == 4
    assert figures["grad_norm"] > 0


@pytest.mark.parametrize("on", [True, False])
def test_a_step_without_any_difference_changes_nothing(tiny: Callable[[str], Path], on: bool):
    """It is counted, and the next one that has something to learn from begins the count anew."""
    teach: list[int] = []
    rl = settings(
        dynamic_sampling={"on": on, "most_waves": 2},
        off_policy={"lag": 0},
        max_steps=60,
        groups=1,
        group_size=2,
        sampling={"max_tokens": 2, "stop": []},
    )

    def reward(row: int, tokens: Sequence[int]) -> float:
        counted.append(row)
        return len(counted) * 1.0 if teach else 0.0

    counted: list[int] = []
    toy = Toy(rl, reward=reward)

    async def play(course: RlCourse, adapter: AdapterHandle) -> None:
        weights: list[list[list[float]]] = []
        for step in range(1, MOST_SILENT_STEPS):
            figures = (await course.start(adapter, step).read()).figures
            assert (figures["grad_norm"], figures["loss"]) == (None, None)
            assert figures["trained_tokens"] == 0
            assert figures["waves"] == (2 if on else 1)
            assert course.memory()["silent_steps"] == step
            if step in (1, MOST_SILENT_STEPS - 1):
                weights.append(await _greedy(course, adapter))
        assert weights[0] == weights[1]
        teach.append(1)
        step = MOST_SILENT_STEPS
        assert (await course.start(adapter, step).read()).figures["grad_norm"] > 0
        assert course.memory()["silent_steps"] == 0
        teach.clear()
        for _ in range(MOST_SILENT_STEPS - 1):
            step += 1
            await course.start(adapter, step).read()
        with pytest.raises(RolloutFailed, match=r"no learning signal: in 20 steps in a row"):
            await course.start(adapter, step + 1).read()

    with_course(tiny("llama"), toy, play)


async def _greedy(course: RlCourse, adapter: AdapterHandle) -> Any:
    policy = await course.publish()
    return (await course.sampler.score(policy, [5, 6, 7, 8])).tolist()


def test_silent_steps_are_counted_over_a_restart(tiny: Callable[[str], Path]):
    toy = Toy(settings(off_policy={"lag": 0}), reward=silent)
    memory = {"silent_steps": MOST_SILENT_STEPS - 2, "place": 3}

    async def play(course: RlCourse, adapter: AdapterHandle) -> None:
        await course.start(adapter, 1).read()
        assert course.memory() == plain({"place": 5, "silent_steps": MOST_SILENT_STEPS - 1})
        with pytest.raises(RolloutFailed, match="no learning signal"):
            await course.start(adapter, 2).read()
        # The first prompts were those of the memory.
        assert [row for step, _, row, _ in sorted(toy.asked) if step == 1] == ORDER.rows(3, 2)

    with_course(tiny("llama"), toy, play, memory=memory)


def test_a_group_goes_on_smaller_or_is_dropped(tiny: Callable[[str], Path]):
    """Of the first group of each step one sample is left, of the second two."""

    def lost(step: int, number: int, sample: int) -> str | None:
        late = sample > number
        return f"sample {sample} of group {number} was late" if late else None

    toy = Toy(settings(off_policy={"lag": 0}), lost=lost, reward=lambda row, tokens: sum(tokens))

    async def play(course: RlCourse, adapter: AdapterHandle) -> None:
        for step in (1, 2):
            found = await course.start(adapter, step).read()
            assert (found.figures["groups"], found.figures["dropped_groups"]) == (1, 1)
            assert found.figures["trained_tokens"] > 0
            # A group that was dropped is not one whose rewards are all the same.
            assert found.figures["zero_variance_groups"] == 0
            (told,) = found.warnings
            assert told.startswith("5 samples were lost: sample ") and "was late" in told

    with_course(tiny("llama"), toy, play)


def test_a_dropped_group_is_replaced_by_a_further_wave(tiny: Callable[[str], Path]):
    def lost(step: int, number: int, sample: int) -> str | None:
        return "late" if number == 0 and sample else None

    rl = settings(dynamic_sampling={"on": True, "most_waves": 2}, off_policy={"lag": 0})
    toy = Toy(rl, lost=lost)

    async def play(course: RlCourse, adapter: AdapterHandle) -> None:
        found = (await course.start(adapter, 1).read()).figures
        assert (found["groups"], found["dropped_groups"], found["waves"]) == (2, 1, 2)
        assert [row for _, _, row, _ in sorted(toy.asked)] == ORDER.rows(0, 3)

    with_course(tiny("llama"), toy, play)


def test_nothing_but_lost_samples_ends_the_run_with_what_went_wrong(tiny: Callable[[str], Path]):
    toy = Toy(settings(), lost=lambda *_: "the judge is out")

    async def play(course: RlCourse, adapter: AdapterHandle) -> None:
        with pytest.raises(RolloutFailed, match="the judge is out"):
            await course.start(adapter, 1).read()

    with_course(tiny("llama"), toy, play)
