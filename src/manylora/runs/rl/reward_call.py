"""A reward function is called by the names of its parameters, as TRL calls one.

def digits(completions, **_): ...            lists in, one number or None per sample out
def right(completion, answer): ...           one sample at a time
"""

import copy
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manylora.runs.rl.user_code import did_you_mean
from manylora.runs.rl.user_types import is_group_reward
from manylora.types import ConfigError, RewardError

# What a function of each form is given besides columns. A column of such a name is not handed on:
# in TRL, too, `completion` is what was sampled.
OF_A_SAMPLE = ("prompt", "completion", "completion_ids", "truncated")
OF_A_GROUP = ("prompts", "completions", "completion_ids", "truncated")
RESERVED = frozenset({*OF_A_SAMPLE, *OF_A_GROUP})


@dataclass(frozen=True, slots=True)
class Scored:
    """A `Scored` sample is one that rewards look at.

    Attributes:
        text: what was sampled, without the token that ended it.
        token_ids: with that token.
        truncated: it was cut where no more tokens were allowed.
    """

    text: str
    token_ids: Sequence[int]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A `RewardFunction` is somebody's function, and what it asks for.

    Attributes:
        shown: what messages call it.
        per_sample: it has the parameter `completion` and scores one sample at a time.
        of_group: it must see all samples of a group at once.
        required: columns that it cannot do without.
        optional: columns that it takes where there are such.
        takes_all: it has `**kwargs` and is given every column.
        args: keywords that the run file gives.
    """

    function: Callable[..., Any]
    shown: str
    per_sample: bool
    of_group: bool
    is_async: bool
    given: frozenset[str]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_all: bool
    args: Mapping[str, Any]

    def check(self, columns: Sequence[str], key: str) -> None:
        """Raise ConfigError if it asks for a column that there is not."""
        there = [name for name in columns if name not in RESERVED]
        for name in self.required:
            if name not in there:
                forms = ", ".join(OF_A_SAMPLE if self.per_sample else OF_A_GROUP)
                near = f" ({did_you_mean(name, there)})" if there else ""
                raise ConfigError(
                    f"{key}: {self.shown} has the parameter {name!r}, and the prompts have no such "
                    f"column{near}; besides columns it can ask for {forms}"
                )

    def keywords(
        self,
        prompt: Any,
        columns: Mapping[str, Any],
        known: Sequence[str],
        samples: Sequence[Scored],
        *,
        chat: bool,
    ) -> dict[str, Any]:
        """Return what it is called with, all its own: it may change what it is given.

        Args:
            known: all columns of the prompts; a row may lack some.
        """
        texts: list[Any] = [
            [{"role": "assistant", "content": one.text}] if chat else one.text for one in samples
        ]
        ids = [list(one.token_ids) for one in samples]
        cut = [one.truncated for one in samples]
        forms = OF_A_SAMPLE if self.per_sample else OF_A_GROUP
        values: dict[str, Any]
        if self.per_sample:
            values = dict(zip(forms, (prompt, texts[0], ids[0], cut[0]), strict=True))
        else:
            values = dict(zip(forms, ([prompt] * len(ids), texts, ids, cut), strict=True))
        if not self.takes_all:
            values = {name: value for name, value in values.items() if name in self.given}
        named = known if self.takes_all else (*self.required, *self.optional)
        for name in named:
            if name in RESERVED or (name not in columns and name in self.optional):
                continue
            value = columns.get(name)
            values[name] = value if self.per_sample else [value] * len(samples)
        return {**_own(values, made=forms[1:]), **copy.deepcopy(dict(self.args))}

    def numbers(self, result: Any, count: int, place: str) -> list[float | None]:
        """Return what it returned as numbers, one per sample.

        Raises:
            RewardError: it is something else; names the function, the row and the value.
        """
        where = f"{self.shown} on {place}"
        if self.per_sample:
            return [_number(result, where)]
        listed = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
            raise RewardError(
                f"{where} returned {_shown(result)}; it must be a list with one number or None "
                f"for each of the {count} samples"
            )
        if len(listed) != count:
            raise RewardError(
                f"{where} returned {len(listed)} numbers for {count} samples: {_shown(listed)}"
            )
        return [_number(value, f"{where}, sample {n},") for n, value in enumerate(listed)]


def _own(values: Mapping[str, Any], made: Sequence[str]) -> dict[str, Any]:
    """Copy what it is called with, of a list for all samples each entry; not what was made for
    this call alone, which may be long."""

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copy.deepcopy(one) for one in value]
        return copy.deepcopy(value)

    return {name: value if name in made else copied(value) for name, value in values.items()}


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, numbers.Real | np.bool_):
        raise RewardError(
            f"{where} returned {_shown(value)}, a {type(value).__name__}; it must be a number, or "
            "None where the reward does not apply"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"{where} returned {_shown(value)}; it must be a finite number or None")
    return number


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}…"


# -- what a function asks for -----------------------------------------------------------------


def read_function(function: Any, args: Mapping[str, Any], shown: str, key: str) -> RewardFunction:
    """Return how a function is called.

    Raises:
        ConfigError: it is no function, or none that a reward can be; names the run file's key.
    """
    parameters = _parameters(function, shown, key)
    named = {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_all = len(named) < len(parameters)
    per_sample = "completion" in named
    forms = OF_A_SAMPLE if per_sample else OF_A_GROUP
    if {"client", "row"} <= named.keys():
        raise ConfigError(f"{key}: {shown} plays a rollout; name it with rl.rollout")
    if per_sample and "completions" in named:
        raise ConfigError(
            f"{key}: {shown} takes completion and completions; keep completion to be called for "
            "each sample, completions to be given a list"
        )
    if not per_sample and not takes_all and not {"completions", "completion_ids"} & named.keys():
        raise ConfigError(
            f"{key}: {shown} takes neither completions (a list) nor completion (one text), so it "
            "could not see what was sampled"
        )
    for name in named:
        if name in RESERVED and name not in forms:
            raise ConfigError(
                f"{key}: {shown} has the parameter {name!r}; a function that takes "
                f"{forms[1]!r} can ask for {', '.join(forms)}"
            )
    of_group = is_group_reward(function)
    if of_group and per_sample:
        raise ConfigError(
            f"{key}: {shown} is marked as a group's reward, and takes one completion; it must take "
            "completions"
        )
    for name in args:
        if name in RESERVED or (name not in named and not takes_all):
            takes = [other for other in named if other not in RESERVED]
            raise ConfigError(
                f"{key}: args has {name!r}, which {shown} does not take; "
                f"{did_you_mean(name, takes)}"
            )
    wanted = [p for name, p in named.items() if name not in RESERVED and name not in args]
    return RewardFunction(
        function=function,
        shown=shown,
        per_sample=per_sample,
        of_group=of_group,
        is_async=is_async(function),
        given=frozenset(named) & frozenset(forms),
        required=tuple(p.name for p in wanted if p.default is p.empty),
        optional=tuple(p.name for p in wanted if p.default is not p.empty),
        takes_all=takes_all,
        args=args,
    )


def is_async(function: Any) -> bool:
    """Return whether calling it gives something to await."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def _parameters(function: Any, shown: str, key: str) -> list[inspect.Parameter]:
    if inspect.iscoroutine(function):
        function.close()
        raise ConfigError(f"{key}: {shown} is a coroutine, not a function; drop its ()")
    if not callable(function) or inspect.isclass(function):
        what = "a class" if inspect.isclass(function) else f"a {type(function).__name__}"
        raise ConfigError(f"{key}: {shown} is {what}; name a function")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigError(f"{key}: {shown} is a generator (it has a yield); it must return")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}: {shown} does not say what parameters it has; write a function around it"
        ) from error
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ConfigError(
                f"{key}: {shown} takes {parameter.name!r} by position only; rewards are called by "
                "name"
            )
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    return [parameter for parameter in parameters if parameter.kind not in kinds]
