"""Which group goes into which step, with which version and which seeds, follows from the run file.

Step s trains on samples of version max(0, s - 1 - lag). So the samples of the next `lag` steps are
in the making while a step trains, and it never matters which of them comes first.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from manylora.config import RlSettings
from manylora.runs.data_order import epoch_order
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.rollout_record import RolloutRecord
from manylora.runs.rl.versions import Versions
from manylora.servers import Policy

# Plays and scores one group: step, number of the group, row of the prompt, policy.
PlayGroup = Callable[[int, int, int, Policy], Awaitable[SampleGroup]]
# Of a group that is smaller there is nothing to compare.
FEWEST_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class Collected:
    """`Collected` is what a step trains on, and what else was sampled for it.

    Attributes:
        groups: in the order of their numbers; none if nothing can be learned.
        others: that are not trained on: too small, or without a difference in their rewards.
        waves: rounds of prompts that were asked.
        dropped: of `others`, those that lost too many samples.
    """

    groups: tuple[SampleGroup, ...]
    others: tuple[SampleGroup, ...]
    waves: int = 1
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """A `PromptOrder` is an endless sequence of rows: all of them in each epoch's own order."""

    size: int
    seed: int

    def rows(self, start: int, count: int) -> list[int]:
        """Return the rows at `count` places from `start` on."""
        return [self._row(place) for place in range(start, start + count)]

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, self.size)
        order = epoch_order(seed=self.seed, epoch=epoch, size=self.size, shuffle=True)
        return int(order[within])


class Collector(Protocol):
    """A `Collector` has the groups of each step made, in its own way."""

    def begin(self, step: int, memory: Mapping[str, Any]) -> None:
        """Begin before a step; `memory` is what `memory` returned when the step before was over."""

    def memory(self, step: int) -> dict[str, Any]:
        """Return what the steps behind one must know, as JSON can hold it."""

    def needed(self, step: int) -> range:
        """Return the versions before that of `step` which the steps behind it may ask for."""

    def launch(self, step: int) -> None:
        """Have groups made that can be made now, as a step begins whose version is published."""

    async def take(self, step: int) -> Collected:
        """Wait for a step's groups; raise what went wrong with them."""

    def oldest(self, step: int) -> int:
        """Return the oldest version that is in use once a step is over."""

    async def close(self) -> None:
        """Have what is in the making end."""


class LagCollector:
    """A `LagCollector` samples each step's groups `lag` steps ahead of their training."""

    def __init__(
        self,
        rl: RlSettings,
        play: PlayGroup,
        teaches: Callable[[SampleGroup], bool],
        versions: Versions,
        record: RolloutRecord | None,
        order: PromptOrder,
        steps: int,
    ):
        """Nothing is in the making yet; `begin` says where it begins.

        Args:
            teaches: whether some sample of a group is better than another.
            record: where groups are written, and found again; None = nowhere.
            steps: of the whole run.
        """
        self._rl, self._play, self._versions, self._record = rl, play, versions, record
        self._teaches = teaches
        self._order, self._lag, self._steps = order, rl.off_policy.lag or 0, steps
        self._tasks: dict[int, asyncio.Task[Collected]] = {}
        # Where each step's prompts begin, once that is known.
        self._places: dict[int, asyncio.Future[int]] = {}

    def version_of(self, step: int) -> int:
        """Return the version that a step's samples are drawn from."""
        return max(0, step - 1 - self._lag)

    def begin(self, step: int, memory: Mapping[str, Any]) -> None:
        """See `Collector.begin`."""
        self._place(step).set_result(memory.get("place", (step - 1) * self._rl.groups))

    def memory(self, step: int) -> dict[str, Any]:
        """Return where the prompts of the step behind this one begin."""
        return {"place": self._place(step + 1).result()}

    def needed(self, step: int) -> range:
        """See `Collector.needed`."""
        return range(self.version_of(step + 1), step)

    def oldest(self, step: int) -> int:
        """See `Collector.oldest`."""
        return self.version_of(step + 1)

    def launch(self, step: int) -> None:
        """Have the groups of this step and of the next `lag` ones made, those that are not."""
        for coming in range(step, min(step + self._lag, self._steps) + 1):
            if coming not in self._tasks:
                policy = self._versions.policy(self.version_of(coming))
                self._tasks[coming] = asyncio.create_task(self._collect(coming, policy))

    async def take(self, step: int) -> Collected:
        """See `Collector.take`."""
        collected = await self._tasks[step]
        del self._tasks[step], self._places[step]
        return collected

    async def close(self) -> None:
        """See `Collector.close`."""
        await cancelled(self._tasks.values())
        self._tasks.clear()

    async def _collect(self, step: int, policy: Policy) -> Collected:
        rl, wanted = self._rl, self._rl.groups
        start = place = await self._place(step)
        if not rl.dynamic_sampling.on:
            self._place(step + 1).set_result(start + wanted)
        kept: list[SampleGroup] = []
        others: list[SampleGroup] = []
        waves = 0
        while len(kept) < wanted and waves < self._most_waves:
            missing = wanted - len(kept)
            rows = self._order.rows(place, missing)
            numbers = range(place - start, place - start + missing)
            made = await all_of(
                self._group(step, number, row, policy)
                for number, row in zip(numbers, rows, strict=True)
            )
            for group in made:
                (kept if self._is_kept(group) else others).append(group)
            place, waves = place + missing, waves + 1
        if rl.dynamic_sampling.on:
            self._place(step + 1).set_result(place)
        dropped = sum(len(group.rollouts) < FEWEST_SAMPLES for group in others)
        return Collected(tuple(kept), tuple(others), waves, dropped)

    async def _group(self, step: int, number: int, row: int, policy: Policy) -> SampleGroup:
        if self._record is not None:
            found = self._record.found.pop((step, number), None)
            if found is not None and found.row == row:
                return found
        group = await self._play(step, number, row, policy)
        if self._record is not None:
            self._record.add(group)
        return group

    def _is_kept(self, group: SampleGroup) -> bool:
        if len(group.rollouts) < FEWEST_SAMPLES:
            return False
        return not self._rl.dynamic_sampling.on or self._teaches(group)

    @property
    def _most_waves(self) -> int:
        dynamic = self._rl.dynamic_sampling
        return dynamic.most_waves if dynamic.on else 1

    def _place(self, step: int) -> asyncio.Future[int]:
        if step not in self._places:
            self._places[step] = asyncio.get_running_loop().create_future()
        return self._places[step]


async def all_of(work: Iterable[Awaitable[SampleGroup]]) -> list[SampleGroup]:
    """Return the results in order; when one fails, the others are ended and its error is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await cancelled(tasks)
        raise


async def cancelled(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended, whatever becomes of them."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
