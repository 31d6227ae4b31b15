"""Held-out prompts are answered before, during and after training, and the answers scored."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from manylora.config import RlEvalSettings
from manylora.runs.course import Progress, Spend
from manylora.runs.rl.players import Players
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.rollout import Rollout
from manylora.servers import Policy
from manylora.types import RewardError, SamplingParams

# Answers that samples.json shows, at most.
MAX_SHOWN = 64


@dataclass(slots=True)
class RlEvaluation:
    """An `RlEvaluation` is the mean reward of answers to held-out prompts.

    Attributes:
        rows: the prompts.
        params: how they are answered.
        players: play them; once the adapter is open.
        publish: publishes the weights as they are, and returns how they are named.
    """

    settings: RlEvalSettings | None
    rows: Sequence[PromptRow]
    params: SamplingParams
    players: Players | None = None
    publish: Callable[[], Awaitable[Policy]] | None = None

    def __bool__(self) -> bool:
        return bool(self.rows)

    async def run(
        self, adapter: Any, tick: Progress, spend: Spend
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Answer every prompt; see `runs/course.py::Evaluation.run`."""
        samples = 1 if self.settings is None else self.settings.samples
        return await self._measured(self.rows, samples, tick, spend)

    async def warm_up(self, adapter: Any, tick: Progress) -> float:
        """See `runs/course.py::Evaluation.warm_up`."""
        return await self._seconds(self.rows[:1], tick)

    async def estimate(self, adapter: Any, tick: Progress) -> float:
        """See `runs/course.py::Evaluation.estimate`: the first sixteen prompts are timed."""
        some = self.rows[:16]
        samples = 1 if self.settings is None else self.settings.samples
        seconds = await self._seconds(some, tick)
        return seconds * len(self.rows) * samples / max(1, len(some))

    async def _seconds(self, rows: Sequence[PromptRow], tick: Progress) -> float:
        spent: list[float] = []
        if rows:
            await self._measured(rows, 1, tick, spent.append)
        return sum(spent)

    async def _measured(
        self, rows: Sequence[PromptRow], samples: int, tick: Progress, spend: Spend
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        assert self.players is not None and self.publish is not None
        policy, players = await self.publish(), self.players
        total, done = len(rows) * samples, 0
        tick("evaluating", 0, total)

        async def one(number: int, sample: int) -> Rollout | str:
            nonlocal done
            found = await players.answer(number, sample, policy, self.params)
            done += 1
            tick("evaluating", done, total)
            return found

        places = [(number, sample) for number in range(len(rows)) for sample in range(samples)]
        found = await asyncio.gather(*(one(*place) for place in places))
        spend(players.spent_on_answers().share)
        whole = [one for one in found if isinstance(one, Rollout)]
        if not whole:
            raise RewardError(f"no answer could be scored: {found[0]}")
        mean = sum(rollout.reward for rollout in whole) / len(whole)
        shown = [
            {
                "prompt": _shown(rows[number]),
                "expected": None,
                "answer": rollout.text,
                "exact": None,
                "reward": rollout.reward,
            }
            for (number, sample), rollout in zip(places, found, strict=True)
            if isinstance(rollout, Rollout) and sample == 0
        ]
        return {"reward": mean, "samples": len(whole)}, shown[:MAX_SHOWN]


def _shown(row: PromptRow) -> str:
    """Return a prompt as a person reads it."""
    turns = (f"{turn.role}: {turn.content or ''}" for turn in row.messages)
    return "\n".join(turns) if row.chat else row.text
