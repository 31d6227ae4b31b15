"""What a step samples from follows from its number and the lag, and from nothing else.

Faults that were planted and seen to fail here: the version read when an answer begins, or after it;
a version published before the step that makes it has ended; answers of an earlier version served
again for the same prompt; q reported at temperature 1; the adapter's scale left out of sampling.
"""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora import Trainer
from manylora.runs.rl.embedded import EmbeddedSampler
from manylora.runs.rl.rollout import RolloutSegment
from manylora.runs.rl.rollout_record import read_step
from manylora.runs.run_folder import AdapterPaths
from manylora.servers import Policy
from manylora.types import (
    AdapterNotFound,
    SampledSequence,
    SampleResult,
    SamplingParams,
)
from tests.unit.runs.rl.toy_runs import (
    SPEC,
    Toy,
    drawn_by,
    make_course,
    no_delay,
    on_base,
    run_toy,
    settings,
)

pytestmark = pytest.mark.usefixtures("threads")
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, stop=())


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_every_token_is_of_the_version_that_the_lag_says(
    tiny: Callable[[str], Path], tmp_path: Path, lag: int
):
    """The log-probabilities are those of that version's weights, and of no other's."""
    temperature = 0.7
    rl = settings(
        off_policy={"lag": lag},
        sampling={"max_tokens": 8, "stop": [], "temperature": temperature},
    )
    # Some are asked for when newer versions are there.
    toy = Toy(rl, late=lambda step, number, sample: 0.15 * (number * sample > 1))

    async def play(trainer: Trainer) -> None:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        course, paths = make_course(trainer, toy), AdapterPaths(tmp_path)
        await course.begin(adapter, paths, 0, {})
        weights = [adapter.snapshot()]
        figures = []
        for step in range(1, 7):
            figures.append((await course.start(adapter, step).read()).figures)
            weights.append(adapter.snapshot())
        await course.end()
        for step in range(1, 7):
            expected = max(0, step - 1 - lag)
            groups = read_step(paths.rollouts, step)
            assert [(one["group"], one["version"]) for one in groups] == [
                (0, expected),
                (1, expected),
            ]
            plain = [s for one in groups for r in one["rollouts"] for s in r["segments"]]
            segments = [RolloutSegment.of_json(one) for one in plain]
            assert {v for one in plain for v in one["versions"]} == {expected}
            gaps = [_gap(snapshot, segments, temperature) for snapshot in weights]
            assert gaps[expected] < 1e-4
            assert all(gap > 1e-2 for v, gap in enumerate(gaps) if v != expected)
            assert figures[step - 1]["version"] == step - 1
            assert figures[step - 1]["staleness_max"] == step - 1 - expected

    on_base(tiny("llama"), play)
    assert toy.versions == {step: {max(0, step - 1 - lag)} for step in range(1, 7)}


def _gap(snapshot: Any, segments: list[RolloutSegment], temperature: float) -> float:
    found = drawn_by(snapshot, segments, temperature)
    return max(
        float(np.abs(logprobs - one.logprobs[one.sampled]).max())
        for logprobs, one in zip(found, segments, strict=True)
    )


@pytest.mark.parametrize("lag", [0, 2])
def test_it_never_matters_which_answer_comes_first(
    tiny: Callable[[str], Path], tmp_path: Path, lag: int
):
    rl = settings(
        off_policy={"lag": lag, "correct": "token_mask"},
        dynamic_sampling={"on": True, "most_waves": 3},
        groups=3,
    )

    async def play(trainer: Trainer) -> None:
        first = await run_toy(trainer, tmp_path / "first", Toy(rl))
        orders = set()
        for seed in range(3):
            draw = random.Random(seed)

            def delay(step: int, number: int, sample: int, draw: random.Random = draw) -> float:
                return draw.choice([0.0, 0.0, 0.001, 0.005, 0.03])

            toy = Toy(rl, delay=delay)
            first.same(await run_toy(trainer, tmp_path / str(seed), toy))
            orders.add(tuple(toy.finished))
        assert len(orders) > 1

    on_base(tiny("llama"), play)


def test_an_unknown_version_is_an_error(tiny: Callable[[str], Path]):
    """It is never the newest, and never the base; a version that was retired is unknown."""

    async def play(trainer: Trainer) -> None:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        sampler = EmbeddedSampler()
        frozen = adapter.snapshot()
        known = (await sampler.publish("toy", 3, frozen)).policy
        assert (await sampler.generate(known, [5, 6], GREEDY, 1)).version == 3
        for unknown in (
            Policy("toy", "", 2),
            Policy("toy", "", 4),
            Policy("other", "", 3),
            Policy("toy", "earlier", 3),
        ):
            with pytest.raises(AdapterNotFound, match=f"version {unknown.version}"):
                await sampler.generate(unknown, [5, 6], GREEDY, 1)
            with pytest.raises(AdapterNotFound, match=unknown.adapter):
                await sampler.score(unknown, [5, 6])
        await sampler.retire(known)
        with pytest.raises(AdapterNotFound, match="version 3"):
            await sampler.generate(known, [5, 6], GREEDY, 1)
        assert (await sampler.health())[0].policies == ()

    on_base(tiny("llama"), play)


def test_a_course_names_the_versions_that_there_are(tiny: Callable[[str], Path]):
    async def play(trainer: Trainer) -> None:
        adapter = await asyncio.to_thread(trainer.create, "toy", SPEC)
        course = make_course(trainer, Toy(settings()))
        await course.begin(adapter, None, 0, {})
        with pytest.raises(AdapterNotFound, match=r"'toy': version 7 is not published.*\[0\]"):
            course._versions.policy(7)
        await course.end()

    on_base(tiny("llama"), play)


class HeldWeights:
    """Frozen weights whose answers come when the test says so."""

    def __init__(self) -> None:
        self.answers: list[Future[Any]] = []

    def sample(self, prompts: Any, params: SamplingParams, *, scoring: Any) -> Future[Any]:
        self.answers.append(Future())
        return self.answers[-1]


def answer() -> SampleResult:
    return SampleResult((SampledSequence((5,), (-0.5,), "length"),))


def test_a_version_in_use_is_retired_when_its_last_request_has_ended():
    async def play() -> None:
        sampler, weights = EmbeddedSampler(), HeldWeights()
        held: Any = weights
        policy = (await sampler.publish("toy", 0, held)).policy
        asked = [
            asyncio.create_task(sampler.generate(policy, [5], GREEDY, seed)) for seed in range(3)
        ]
        while len(weights.answers) < 3:
            await asyncio.sleep(0)
        retiring = asyncio.create_task(sampler.retire(policy))
        weights.answers[0].set_result(answer())
        weights.answers[1].set_exception(ValueError("refused"))
        await asyncio.wait(asked[:2])
        for _ in range(20):
            await asyncio.sleep(0)
        assert not retiring.done()
        assert (await sampler.health())[0].running == 1
        # One whose caller goes away is over, too.
        asked[2].cancel()
        await asyncio.wait_for(retiring, 10)
        assert (await sampler.health())[0].policies == ()
        assert asked[0].result().tokens == (5,)
        assert isinstance(asked[1].exception(), ValueError)

    asyncio.run(play())


def test_weights_are_dropped_only_after_their_requests(tiny: Callable[[str], Path], tmp_path: Path):
    """A sampler that is slow to let go of a version holds its weights as long."""

    class Slow(EmbeddedSampler):
        def __init__(self) -> None:
            super().__init__()
            self.retired: list[int] = []

        async def retire(self, policy: Policy) -> None:
            # Whoever drops the weights before this has returned makes this request fail.
            await self.generate(policy, [5], GREEDY, 0)
            await super().retire(policy)
            self.retired.append(policy.version)

    sampler = Slow()
    rl = settings(off_policy={"lag": 1})

    async def play(trainer: Trainer) -> None:
        expected = await run_toy(trainer, tmp_path / "plain", Toy(rl, delay=no_delay))
        found = await run_toy(trainer, tmp_path / "slow", Toy(rl), sampler=sampler)
        expected.same(found)

    on_base(tiny("llama"), play)
    assert sorted(sampler.retired) == [0, 1, 2, 3, 4, 5]
