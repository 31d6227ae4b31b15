"""Small runs of reinforcement learning: a tiny base, token ids for words, a reward of ids."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from manylora import Trainer
from manylora.config import RlSettings
from manylora.runs.rl.collecting import PromptOrder
from manylora.runs.rl.embedded import EmbeddedSampler
from manylora.runs.rl.rl_course import RlCourse
from manylora.runs.rl.rl_evals import RlEvaluation
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.servers import Policy, Sampler
from manylora.types import AdamParams, DeviceTime, SamplingParams

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]
ADAM = AdamParams(lr=2e-2, clip_norm=1.0)


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


class ToyPlayers:
    """`ToyPlayers` sample by ids and like small ones."""

    def __init__(self, rl: RlSettings, sampler: Sampler, delays: Sequence[float] = ()):
        self.rl, self.sampler, self.delays = rl, sampler, delays
        self.played: list[tuple[int, int, int]] = []
        self._spent = DeviceTime()

    async def play(self, step: int, number: int, row: int, policy: Policy) -> SampleGroup:
        self.played.append((step, number, policy.version))
        rollouts = await asyncio.gather(
            *(self._one(step, number, row, sample, policy) for sample in range(self.rl.group_size))
        )
        return SampleGroup(
            step=step, number=number, row=row, version=policy.version, rollouts=tuple(rollouts)
        )

    async def _one(self, step: int, number: int, row: int, sample: int, policy: Policy) -> Rollout:
        seed = hash((step, number, sample)) % 2**32
        params = SamplingParams(
            max_tokens=self.rl.sampling.max_tokens,
            temperature=self.rl.sampling.temperature,
            stop=(),
        )
        turn = await self.sampler.generate(policy, PROMPTS[row], params, seed)
        if self.delays:
            await asyncio.sleep(self.delays[(step + number + sample) % len(self.delays)])
        tokens = np.array([*PROMPTS[row], *turn.tokens], np.int32)
        sampled = np.arange(len(tokens)) >= len(PROMPTS[row])
        logprobs = np.zeros(len(tokens), np.float32)
        logprobs[sampled] = turn.logprobs
        versions = np.where(sampled, turn.version, -1).astype(np.int32)
        segment = RolloutSegment(tokens, sampled, logprobs, versions)
        low = float(np.mean([token < 40 for token in turn.tokens]))
        return Rollout(segments=(segment,), reward=low, parts={"low": low}, stop_reason="stop")

    def spent(self) -> DeviceTime:
        return self._spent

    async def close(self) -> None:
        """Nothing is held."""


def make_course(trainer: Trainer, rl: RlSettings, delays: Sequence[float] = ()) -> RlCourse:
    """Return a course on the trainer's base."""
    sampler = EmbeddedSampler()
    return RlCourse(
        rl=rl,
        parts=("low",),
        steps=rl.known_steps,
        sampler=sampler,
        players=lambda paths, renew: ToyPlayers(rl, sampler, delays),
        order=PromptOrder(len(PROMPTS), 0),
        adam=lambda step: ADAM,
        base_forward=trainer.forward,
        evals=RlEvaluation(None, (), SamplingParams()),
    )
