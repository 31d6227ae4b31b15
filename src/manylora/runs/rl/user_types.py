"""Users' own files import these from `manylora`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_GROUP = "manylora_group_reward"


def group_reward(function: Function) -> Function:
    """Mark a reward function that compares the samples of a group with each other.

    It is called once for each prompt, with all samples of its group that came to an end, in their
    order, when the last of them is there. A function without the mark may be given any number of
    samples of a prompt, one at a time too, as soon as they are there, so that what it raises costs
    one sample and not the group.
    """
    setattr(function, _GROUP, True)
    return function


def is_group_reward(function: object) -> bool:
    """Return whether a function was marked with `group_reward`."""
    return bool(getattr(function, _GROUP, False))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutResult:
    """A `RolloutResult` is what a hook returns that has more to say than a number.

    Attributes:
        reward: what is trained on.
        parts: what it is made of, by name, for people; None = it does not apply here.
        metrics: further figures of this rollout, for people.
    """

    reward: float
    parts: Mapping[str, float | None] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
