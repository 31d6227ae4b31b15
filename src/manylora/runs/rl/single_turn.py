"""Where rewards are functions, a rollout is one answer to its prompt; hooks go the same way."""

import time
from collections.abc import Mapping

from manylora.runs.rl.play_client import PlayClient, PlayedTurn
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.reward_call import Scored
from manylora.runs.rl.rewards import RewardSet
from manylora.runs.rl.rollout import Rollout


async def play_answer(client: PlayClient, row: PromptRow) -> PlayedTurn:
    """Sample one answer to a prompt, on the run's own loop."""
    return await client.sample(row.tokens)


def as_scored(client: PlayClient, turn: PlayedTurn) -> Scored:
    """Return an answer as rewards look at it."""
    return Scored(client.plain(turn), turn.token_ids, turn.stop_reason == "length")


def rewarded(
    client: PlayClient,
    rewards: RewardSet,
    parts: Mapping[str, float | None],
    *,
    begun: float,
    reward_seconds: float = 0.0,
) -> Rollout:
    """Return the rollout of one answer with its reward.

    Args:
        parts: of the reward, as `RewardSet.score` returned them.
        begun: when it was asked for, on the clock of `time.monotonic`.
        reward_seconds: what the reward took.

    Raises:
        RewardError: the weighted sum is not finite.
    """
    return client.rollout(
        rewards.weighted(parts),
        parts=dict(parts),
        seconds=time.monotonic() - begun,
        reward_seconds=reward_seconds,
    )
