"""Whatever plays, a `Rollout` comes of it: token ids with what is known of each.

Text is never tokenised a second time: what was sampled is trained by its own ids.

N tokens of a segment.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manylora.types.data import Array


@dataclass(frozen=True, slots=True)
class RolloutSegment:
    """A `RolloutSegment` is trained as one sequence: prompts, and what was sampled in between.

    Attributes:
        tokens: int32 [N].
        sampled: bool [N]; which of them the policy drew. The first token never is.
        logprobs: float32 [N], of each sampled token when it was drawn; 0 elsewhere.
        versions: int32 [N], of the weights that drew it; -1 elsewhere.
    """

    tokens: Array
    sampled: Array
    logprobs: Array
    versions: Array

    @property
    def num_sampled(self) -> int:
        """So many tokens were drawn."""
        return int(np.count_nonzero(self.sampled))

    def to_json(self) -> dict[str, Any]:
        """Return plain data from which `of_json` makes the same bits."""
        drawn = np.flatnonzero(self.sampled)
        return {
            "tokens": self.tokens.tolist(),
            "sampled": drawn.tolist(),
            "logprobs": self.logprobs[drawn].astype(np.float64).tolist(),
            "versions": self.versions[drawn].tolist(),
        }

    @classmethod
    def of_json(cls, plain: Mapping[str, Any]) -> "RolloutSegment":
        """Return the segment of which `to_json` made this."""
        size, drawn = len(plain["tokens"]), np.array(plain["sampled"], dtype=np.int64)
        sampled = np.zeros(size, dtype=bool)
        logprobs, versions = np.zeros(size, np.float32), np.full(size, -1, np.int32)
        sampled[drawn] = True
        logprobs[drawn] = plain["logprobs"]
        versions[drawn] = plain["versions"]
        return cls(np.array(plain["tokens"], dtype=np.int32), sampled, logprobs, versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A `Rollout` is one sample of a group, scored.

    Attributes:
        segments: one, or as many as its turns did not continue each other.
        reward: the weighted sum of its parts.
        parts: each reward by name; None = it does not apply here.
        text: the answer as a person reads it.
        stop_reason: of its last turn.
        turns: answers of the policy in it.
        metrics: figures of a hook's own.
        seconds: from its first request to its reward.
        reward_seconds: of those, in the reward.
    """

    segments: tuple[RolloutSegment, ...]
    reward: float
    parts: Mapping[str, float | None] = field(default_factory=dict)
    text: str = ""
    stop_reason: str = "stop"
    turns: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)
    reward_seconds: float = field(default=0.0, compare=False)

    @property
    def truncated(self) -> bool:
        """It was cut where no more tokens were allowed."""
        return self.stop_reason == "length"

    @property
    def num_sampled(self) -> int:
        """So many tokens were drawn."""
        return sum(segment.num_sampled for segment in self.segments)

    def to_json(self) -> dict[str, Any]:
        """Return plain data from which `of_json` makes the same rollout."""
        return {
            "segments": [segment.to_json() for segment in self.segments],
            "reward": self.reward,
            "parts": dict(self.parts),
            "text": self.text,
            "stop_reason": self.stop_reason,
            "turns": self.turns,
            "metrics": dict(self.metrics),
            "seconds": round(self.seconds, 4),
            "reward_seconds": round(self.reward_seconds, 4),
        }

    @classmethod
    def of_json(cls, plain: Mapping[str, Any]) -> "Rollout":
        """Return the rollout of which `to_json` made this."""
        segments = tuple(RolloutSegment.of_json(one) for one in plain["segments"])
        others: dict[str, Any] = dict(plain)
        return cls(**others | {"segments": segments})


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGroup:
    """A `SampleGroup` has the samples of one prompt that a step trains on.

    Attributes:
        step: that it was sampled for, 1, 2, …
        number: of the group in its step, 0, 1, …, over all waves.
        row: of its prompt among the prompts.
        version: of the weights that its samples began with.
        rollouts: those that came to an end.
        errors: why others did not.
    """

    step: int
    number: int
    row: int
    version: int
    rollouts: tuple[Rollout, ...]
    errors: tuple[str, ...] = ()

    @property
    def oldest(self) -> int:
        """The oldest weights that drew a token of it."""
        drawn = (
            segment.versions[segment.sampled]
            for rollout in self.rollouts
            for segment in rollout.segments
        )
        return min(
            (int(versions.min()) for versions in drawn if len(versions)), default=self.version
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data from which `of_json` makes the same group."""
        return {
            "step": self.step,
            "group": self.number,
            "row": self.row,
            "version": self.version,
            "rollouts": [rollout.to_json() for rollout in self.rollouts],
            "errors": list(self.errors),
        }

    @classmethod
    def of_json(cls, plain: Mapping[str, Any]) -> "SampleGroup":
        """Return the group of which `to_json` made this."""
        return cls(
            step=plain["step"],
            number=plain["group"],
            row=plain["row"],
            version=plain["version"],
            rollouts=tuple(Rollout.of_json(one) for one in plain["rollouts"]),
            errors=tuple(plain["errors"]),
        )
