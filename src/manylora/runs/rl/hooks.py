"""A hook plays one rollout: `async def play(client, row)`, and what it returns is the reward."""

import asyncio
import functools
import inspect
import math
import numbers
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from manylora.runs.rl.play_client import PlayClient, time_left
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.reward_call import is_async
from manylora.runs.rl.rollout import Rollout
from manylora.runs.rl.user_code import load_symbol, shown_name
from manylora.runs.rl.user_threads import UserThreads
from manylora.runs.rl.user_types import RolloutResult
from manylora.types import ConfigError, ManyloraError, RolloutFailed

_FORM = "async def play(client, row)"


def load_hook(name: str, adapter: str) -> Any:
    """Return the hook that a run file names with `rl.rollout`.

    Raises:
        ConfigError: there is none, or it is not of the form `async def play(client, row)`.
    """
    key = f"adapters.{adapter}.rl.rollout"
    hook, shown = load_symbol(name, key), shown_name(name)
    if inspect.iscoroutine(hook):
        hook.close()
        raise ConfigError(f"{key}: {shown} is a coroutine, not a function; drop its ()")
    if not callable(hook) or inspect.isclass(hook) or not is_async(hook):
        raise ConfigError(f"{key}: {shown} must be written as `{_FORM}`")
    try:
        inspect.signature(hook).bind(None, None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {shown} must be written as `{_FORM}`: {error}") from error
    return hook


async def play_rollout(
    hook: Any, client: PlayClient, row: PromptRow, *, threads: UserThreads, shown: str = "rollout"
) -> Rollout:
    """Have a hook play one rollout, until the client's deadline.

    Args:
        shown: what messages call the hook.

    Raises:
        RolloutFailed: it raised, took too long, sampled nothing, or returned something else than a
            finite number, a `RolloutResult` or a `Rollout`.
        ManyloraError: what the sampler raised, if it was that.
    """
    begun = time.monotonic()
    what = f"adapter {threads.adapter}: rollout {shown} on {row.place}"
    try:
        result = await threads.play(
            what,
            functools.partial(hook, client, row.for_hook()),
            error=RolloutFailed,
            timeout=time_left(client.deadline),
        )
        return _rollout(result, client, what, time.monotonic() - begun)
    except (RolloutFailed, asyncio.CancelledError):
        if isinstance(client.failure, ManyloraError):
            raise client.failure from None
        raise
    finally:
        client.end()


def _rollout(result: Any, client: PlayClient, what: str, seconds: float) -> Rollout:
    if isinstance(result, Rollout):
        reward = _finite(result.reward, "reward", what)
        if result.segments:
            if not result.num_sampled:
                raise RolloutFailed(f"{what} has no sampled token, so there is nothing to train on")
            return replace(result, reward=reward, seconds=seconds)
        result = RolloutResult(reward=reward, parts=result.parts, metrics=result.metrics)
    if not isinstance(result, RolloutResult):
        result = RolloutResult(reward=result)
    reward = _finite(result.reward, "reward", what)
    parts = {
        str(name): None if value is None else _finite(value, f"part {name!r}", what)
        for name, value in _mapping(result.parts, "parts", what).items()
    }
    metrics = {
        str(name): _finite(value, f"metric {name!r}", what)
        for name, value in _mapping(result.metrics, "metrics", what).items()
    }
    try:
        return client.rollout(reward, parts=parts, metrics=metrics, seconds=seconds)
    except RolloutFailed as error:
        raise RolloutFailed(f"{what}: {error}") from None


def _mapping(value: Any, name: str, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise RolloutFailed(f"{what} returned {name} that are a {type(value).__name__}, not a dict")
    return value


def _finite(value: Any, name: str, what: str) -> float:
    number = math.nan
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, numbers.Real | np.bool_):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise RolloutFailed(
            f"{what} returned the {name} {value!r:.80}, a {type(value).__name__}; it must be a "
            "finite number"
        )
    return number
