"""The rewards of an adapter are functions and built-in ones, each with a weight.

The contract is TRL's: parameters by name, columns of the prompts among them; a number or None for
each sample. A function without the mark `@manylora.group_reward` is given whatever samples of a
prompt are scored together, which may be one; a marked one is given a whole group.
"""

import asyncio
import functools
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manylora.config.rl import RewardUse
from manylora.runs.rl.builtin_rewards import BUILTIN_REWARDS, open_builtin
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.reward_call import RESERVED, RewardFunction, Scored, read_function
from manylora.runs.rl.user_code import did_you_mean, load_symbol, shown_name
from manylora.runs.rl.user_threads import UserThreads
from manylora.types import ConfigError, RewardError


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A `_Weighted` is one reward of the sum."""

    name: str
    key: str
    weight: float
    call: RewardFunction


class RewardSet:
    """A `RewardSet` scores samples of one adapter.

    Attributes:
        needs_groups: one of the rewards must see all samples of a group at once; otherwise
            samples may be scored as they come.
        required: columns that every row must have.
    """

    def __init__(
        self, uses: Sequence[RewardUse], *, adapter: str, threads: UserThreads | None = None
    ):
        """Load what the run file names.

        Args:
            threads: what the functions run in; closed by whoever made them.

        Raises:
            ConfigError: there is no such function, or it cannot be a reward.
        """
        self._adapter = adapter
        self._threads = UserThreads(adapter) if threads is None else threads
        self._columns: tuple[str, ...] = ()
        self._parts = [
            _open(use, name, f"adapters.{adapter}.rl.reward.{number}")
            for number, (use, name) in enumerate(zip(uses, part_names(uses), strict=True))
        ]
        self.needs_groups = any(part.call.of_group for part in self._parts)
        self.required = tuple(
            dict.fromkeys(name for part in self._parts for name in part.call.required)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """These are the parts' names, in the run file's order."""
        return tuple(part.name for part in self._parts)

    def check(self, columns: Sequence[str]) -> None:
        """Note the columns that the prompts have.

        Raises:
            ConfigError: a function asks for one that is not there; names those which are.
        """
        for part in self._parts:
            part.call.check(columns, part.key)
        self._columns = tuple(name for name in columns if name not in RESERVED)

    async def score(
        self, row: PromptRow, samples: Sequence[Scored], *, timeout: float | None = None
    ) -> list[dict[str, float | None]]:
        """Return the parts of each sample's reward.

        Args:
            samples: answers to this prompt; of a whole group if `needs_groups`.
            timeout: seconds that all of it may take; None = no limit.

        Raises:
            RewardError: a function raised, took too long, or gave no number; names the function,
                the row and the value.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        tasks = [
            asyncio.ensure_future(self._of_part(part, row, samples, deadline))
            for part in self._parts
        ]
        try:
            columns = await asyncio.gather(*tasks)
        finally:
            await _cancelled(tasks)
        return [
            {part.name: values[n] for part, values in zip(self._parts, columns, strict=True)}
            for n in range(len(samples))
        ]

    async def score_each(
        self, row: PromptRow, samples: Sequence[Scored], *, timeout: float | None = None
    ) -> list[dict[str, float | None] | RewardError]:
        """Return the same, with an error in the place of each sample that could not be scored:
        all of a group's where one of the rewards must see the group."""
        if self.needs_groups:
            try:
                return list(await self.score(row, samples, timeout=timeout))
            except RewardError as error:
                return [error] * len(samples)

        async def one(sample: Scored) -> dict[str, float | None] | RewardError:
            try:
                return (await self.score(row, [sample], timeout=timeout))[0]
            except RewardError as error:
                return error

        return list(await asyncio.gather(*(one(sample) for sample in samples)))

    def weighted(self, parts: Mapping[str, float | None]) -> float:
        """Return the reward: the sum of weight times part. Parts that are None are left out; where
        all are, it is 0, as in TRL (a `nansum`).

        Raises:
            RewardError: the sum is not finite.
        """
        values = [(part.weight, parts[part.name]) for part in self._parts]
        total = sum(weight * value for weight, value in values if value is not None)
        if not math.isfinite(total):
            raise RewardError(
                f"adapter {self._adapter}: the sum of the rewards {dict(parts)} is not finite"
            )
        return float(total)

    async def _of_part(
        self,
        part: _Weighted,
        row: PromptRow,
        samples: Sequence[Scored],
        deadline: float | None,
    ) -> list[float | None]:
        if not part.call.per_sample:
            return await self._called(part, row, samples, deadline)
        tasks = [
            asyncio.ensure_future(self._called(part, row, [sample], deadline)) for sample in samples
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            await _cancelled(tasks)
        return [value for values in found for value in values]

    async def _called(
        self,
        part: _Weighted,
        row: PromptRow,
        samples: Sequence[Scored],
        deadline: float | None,
    ) -> list[float | None]:
        if not samples:
            return []
        call = part.call
        keywords = call.keywords(
            row.prompt, row.columns, self._columns or tuple(row.columns), samples, chat=row.chat
        )
        what = f"adapter {self._adapter}: reward {call.shown} on {row.place}"
        function = functools.partial(call.function, **keywords)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        run: Any = self._threads.play if call.is_async else self._threads.call
        result = await run(what, function, error=RewardError, timeout=left)
        if inspect.isawaitable(result):
            # A function that was written without `async` returned what another one has to do.
            awaited = result
            result = await self._threads.play(
                what, lambda: awaited, error=RewardError, timeout=left
            )
        try:
            return call.numbers(result, len(samples), row.place)
        except RewardError as error:
            raise RewardError(f"adapter {self._adapter}: reward {error}") from None


async def _cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what is left once one of them has failed, and wait for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def part_names(uses: Sequence[RewardUse]) -> list[str]:
    """Return each part's name: its symbol, with a number where that is another's name, too."""
    names: list[str] = []
    for use in uses:
        symbol = use.use.rpartition(":")[2]
        name, number = symbol, 1
        while name in names:
            number += 1
            name = f"{symbol}_{number}"
        names.append(name)
    return names


def _open(use: RewardUse, name: str, key: str) -> _Weighted:
    weight = use.weight
    if use.use in BUILTIN_REWARDS:
        return _Weighted(name, key, weight, open_builtin(use.use, use.args, key))
    if ":" not in use.use:
        raise ConfigError(
            f"{key}: no reward {use.use!r} is built in "
            f"({did_you_mean(use.use, sorted(BUILTIN_REWARDS))}); one of your own is named "
            "rewards.py:symbol"
        )
    function = load_symbol(use.use, key)
    return _Weighted(name, key, weight, read_function(function, use.args, shown_name(use.use), key))
