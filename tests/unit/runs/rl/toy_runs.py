"""Small courses of reinforcement learning in this process: a tiny base, ids for words."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from manylora import AdapterHandle, Trainer
from manylora.config import RlSettings
from manylora.runs.course import StepFigures
from manylora.runs.rl.collecting import PromptOrder
from manylora.runs.rl.embedded import EmbeddedSampler
from manylora.runs.rl.play_client import PlayClient, PlaySettings
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.rl_course import Renew, RlCourse
from manylora.runs.rl.rl_evals import RlEvaluation
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.runs.rl.rollout_record import read_step
from manylora.runs.run_folder import AdapterPaths
from manylora.servers import Policy, Sampler
from manylora.types import AdamParams, AdapterSpec, DeviceTime, RolloutFailed, SamplingParams
from manylora.types.data import Array, causal_datum
from tests.unit.runs.rl.small_runs import without_seconds

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]
ADAM = AdamParams(lr=2e-2, clip_norm=1.0)
SPEC = AdapterSpec(rank=4, alpha=8, seed=2)


def settings(**changes: Any) -> RlSettings:
    """Two groups of four, eight tokens."""
    given = {
        "prompts": "toy.jsonl",
        "reward": "toy.py:low",
        "groups": 2,
        "group_size": 4,
        "max_steps": 6,
        "sampling": {"max_tokens": 8, "stop": []},
    }
    return RlSettings.model_validate(given | changes)


def low(row: int, tokens: Sequence[int]) -> float:
    """The share of small ids."""
    return float(np.mean([token < 40 for token in tokens]))


def nothing(step: int, number: int, sample: int) -> None:
    """No sample is lost."""


def no_delay(step: int, number: int, sample: int) -> float:
    """Every answer is scored at once."""
    return 0.0


@dataclass
class Toy:
    """What an adapter's players do, and what they were asked.

    `lost` says why a sample is lost, or nothing; `longest` is of a row's answers, and the run's
    where it has none. `asked` has step, number of the group, row and version.
    """

    rl: RlSettings
    reward: Callable[[int, Sequence[int]], float] = low
    delay: Callable[[int, int, int], float] = no_delay
    # Before an answer is asked for, as of a later turn.
    late: Callable[[int, int, int], float] = no_delay
    lost: Callable[[int, int, int], str | None] = nothing
    longest: dict[int, int] = field(default_factory=dict)
    seed: int = 0
    asked: list[tuple[int, int, int, int]] = field(default_factory=list)
    # Step, group and sample of each answer, as they came.
    finished: list[tuple[int, int, int]] = field(default_factory=list)
    ended: int = 0
    closed: bool = False
    # Called when a group is asked for, before it begins.
    watch: Callable[[], None] = lambda: None

    @property
    def versions(self) -> dict[int, set[int]]:
        """The versions of which each step was sampled."""
        found: dict[int, set[int]] = {}
        for step, _, _, version in self.asked:
            found.setdefault(step, set()).add(version)
        return found


class Words:
    """In place of a tokenizer and an encoder: ids are the words."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class ToyPlayers:
    """`ToyPlayers` sample by ids and like what their toy likes."""

    def __init__(self, toy: Toy, sampler: Sampler, renew: Renew | None):
        words: Any = Words()
        sampling = toy.rl.sampling
        self.toy, self.renew = toy, renew
        self.settings = PlaySettings(
            sampler=sampler,
            encoder=words,
            tokenizer=words,
            params=SamplingParams(
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, stop=()
            ),
            seed=toy.seed,
        )

    async def play(self, step: int, number: int, row: int, policy: Policy) -> SampleGroup:
        self.toy.watch()
        self.toy.asked.append((step, number, row, policy.version))
        samples = range(self.toy.rl.group_size)
        found = await asyncio.gather(
            *(self._one(step, number, row, sample, policy) for sample in samples)
        )
        self.toy.ended += 1
        return SampleGroup(
            step=step,
            number=number,
            row=row,
            version=policy.version,
            rollouts=tuple(one for one in found if isinstance(one, Rollout)),
            errors=tuple(one for one in found if isinstance(one, str)),
        )

    async def _one(
        self, step: int, number: int, row: int, sample: int, policy: Policy
    ) -> Rollout | str:
        prompt = PromptRow(row, f"toy.jsonl:{row + 1}", text="")
        client = PlayClient(
            self.settings, policy, prompt, step=step, group=number, sample=sample, renew=self.renew
        )
        if (why := self.toy.lost(step, number, sample)) is not None:
            return why
        longest = self.toy.longest.get(row)
        await asyncio.sleep(self.toy.late(step, number, sample))
        turn = await client.sample(PROMPTS[row], max_tokens=longest)
        await asyncio.sleep(self.toy.delay(step, number, sample))
        self.toy.finished.append((step, number, sample))
        try:
            reward = self.toy.reward(row, turn.token_ids)
        except ValueError as error:
            raise RolloutFailed(str(error)) from error
        return client.rollout(reward, parts={"low": reward})

    def spent(self) -> DeviceTime:
        return DeviceTime()

    async def close(self) -> None:
        self.toy.closed = True


def make_course(
    trainer: Trainer, toy: Toy, sampler: Sampler | None = None, prompts: int = len(PROMPTS)
) -> RlCourse:
    """Return a course on the trainer's base."""
    sampler = sampler or EmbeddedSampler()
    return RlCourse(
        rl=toy.rl,
        parts=("low",),
        steps=toy.rl.known_steps,
        sampler=sampler,
        players=lambda paths, renew: ToyPlayers(toy, sampler, renew),
        order=PromptOrder(prompts, toy.seed),
        adam=lambda step: ADAM,
        base_forward=trainer.forward,
        evals=RlEvaluation(None, (), SamplingParams()),
    )


@dataclass
class Ended:
    """What an adapter has at the end of a course, or of a part of it; bytes by name."""

    figures: list[dict[str, Any]]
    state: dict[str, bytes]
    rollouts: list[Any]
    warnings: list[Sequence[str]]

    def same(self, other: "Ended") -> None:
        """Check that nothing but times differs."""
        assert self.figures == other.figures
        assert self.state == other.state
        assert self.rollouts == other.rollouts
        assert self.warnings == other.warnings


async def steps_of(
    course: RlCourse, adapter: AdapterHandle, first: int, last: int
) -> list[StepFigures]:
    """Make steps, one after the other."""
    return [await course.start(adapter, step).read() for step in range(first, last + 1)]


async def run_toy(
    trainer: Trainer,
    folder: Path,
    toy: Toy,
    name: str = "toy",
    spec: AdapterSpec = SPEC,
    sampler: Sampler | None = None,
) -> Ended:
    """Train one adapter from beginning to end; `folder` is its own."""
    adapter = await asyncio.to_thread(trainer.create, name, spec)
    course = make_course(trainer, toy, sampler)
    paths = AdapterPaths(folder)
    try:
        await course.begin(adapter, paths, 0, {})
        try:
            made = await steps_of(course, adapter, 1, course.steps)
        finally:
            await course.end()
        return await ended(adapter, paths, made)
    finally:
        await asyncio.wrap_future(adapter.unload())


async def ended(
    adapter: AdapterHandle, paths: AdapterPaths, made: Sequence[StepFigures], first: int = 1
) -> Ended:
    """Return what there is after the steps from `first` on."""
    folder = paths.root / "state"
    await asyncio.wrap_future(adapter.save(folder))
    return Ended(
        [without_seconds(one.figures) for one in made],
        {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))},
        [
            without_seconds(read_step(paths.rollouts, step))
            for step in range(first, first + len(made))
        ],
        [one.warnings for one in made],
    )


def on_base(base: Path, play: Callable[[Trainer], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine with a trainer on a base."""
    with Trainer(base) as trainer:
        return asyncio.run(play(trainer))


def plain(value: Any) -> Any:
    """Return what JSON makes of a value."""
    return json.loads(json.dumps(value))


def drawn_by(snapshot: Any, segments: Sequence[RolloutSegment], temperature: float) -> list[Array]:
    """Return what frozen weights make of the sampled tokens' log-probabilities."""
    data = [causal_datum(one.tokens, one.sampled) for one in segments]
    result = snapshot.forward(data, logprobs="trained", temperature=temperature).result()
    return list(result.logprobs)
