"""Free running: sampling goes as fast as it can, and what has become too old is dropped.

At version v, with m = `max_staleness`, so many further groups may begin (https://arxiv.org/abs/2505.24298):

    min(max_concurrent - running, (m + v + 1) · groups - (accepted + running))

What is trained on which step depends on time, so a run does not end with the same bits twice.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from manylora.config import RlSettings
from manylora.runs.rl.collecting import (
    FEWEST_SAMPLES,
    Collected,
    PlayGroup,
    PromptOrder,
    cancelled,
)
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.rollout_record import RolloutRecord
from manylora.runs.rl.versions import Versions


class FreeCollector:
    """A `FreeCollector` keeps as many groups in the making as staleness allows."""

    def __init__(
        self,
        rl: RlSettings,
        play: PlayGroup,
        teaches: Callable[[SampleGroup], bool],
        versions: Versions,
        record: RolloutRecord | None,
        order: PromptOrder,
    ):
        """Nothing is in the making yet; see `LagCollector` for the arguments."""
        self._rl, self._play, self._teaches = rl, play, teaches
        self._versions, self._record, self._order = versions, record, order
        self._staleness = rl.off_policy.max_staleness or 0
        self._running: dict[asyncio.Future[SampleGroup], tuple[int, int]] = {}
        self._ready: deque[SampleGroup] = deque()
        self._others: list[SampleGroup] = []
        # Groups that were trained on, the next place of the order, and rows to be asked again.
        self._trained = self._place = self._number = self._stale = 0
        self._again: deque[int] = deque()
        self._arrived = asyncio.Event()
        self._error: BaseException | None = None

    def begin(self, step: int, memory: Mapping[str, Any]) -> None:
        """See `Collector.begin`; groups that an earlier attempt had ready are taken up."""
        self._trained = (step - 1) * self._rl.groups
        self._place = memory.get("place", self._trained)
        self._number = memory.get("number", self._trained)
        self._again.extend(memory.get("again", ()))
        ready = [SampleGroup.of_json(plain) for plain in memory.get("ready", ())]
        later = () if self._record is None else self._record.found.values()
        # What has become too old meanwhile is dropped by the next step, as ever.
        for group in (*ready, *later):
            self._number = max(self._number, group.number + 1)
            self._sort(group)

    def memory(self, step: int) -> dict[str, Any]:
        """Return which prompts are to be asked next, the next group's number, and what is ready."""
        again = [*(row for _, row in self._running.values()), *self._again]
        ready = [group.to_json() for group in self._ready]
        return {"place": self._place, "number": self._number, "again": again, "ready": ready}

    def needed(self, step: int) -> range:
        """No step asks for older weights than the newest."""
        return range(step, step)

    def oldest(self, step: int) -> int:
        """See `Collector.oldest`."""
        return min([version for version, _ in self._running.values()], default=step)

    def launch(self, step: int) -> None:
        """Begin as many groups as may be, with the newest version."""
        version = self._versions.newest
        most = self._rl.off_policy.max_concurrent or (self._staleness + 1) * self._rl.groups
        while True:
            running, accepted = len(self._running), self._trained + len(self._ready)
            ahead = (self._staleness + version + 1) * self._rl.groups - (accepted + running)
            if min(most - running, ahead) <= 0:
                return
            row = self._again.popleft() if self._again else self._next_row()
            policy = self._versions.policy(version)
            task = asyncio.ensure_future(self._play(step, self._number, row, policy))
            self._running[task] = (version, row)
            self._number += 1
            task.add_done_callback(self._ended)

    async def take(self, step: int) -> Collected:
        """Return the groups that were ready first and are not too old."""
        most_others = self._rl.dynamic_sampling.most_waves * self._rl.groups
        while True:
            if self._error is not None:
                raise self._error
            self._drop_stale(step - 1)
            if len(self._ready) >= self._rl.groups or len(self._others) >= most_others:
                break
            self._arrived.clear()
            self.launch(step)
            await self._arrived.wait()
        groups = [self._ready.popleft() for _ in range(min(self._rl.groups, len(self._ready)))]
        others, stale = tuple(self._others), self._stale
        self._others.clear()
        self._stale = 0
        self._trained += self._rl.groups
        dropped = stale + sum(len(group.rollouts) < FEWEST_SAMPLES for group in others)
        return Collected(tuple(groups), others, dropped=dropped)

    async def close(self) -> None:
        """See `Collector.close`."""
        await cancelled(self._running)
        self._running.clear()

    def _next_row(self) -> int:
        (row,) = self._order.rows(self._place, 1)
        self._place += 1
        return row

    def _ended(self, task: asyncio.Future[SampleGroup]) -> None:
        self._running.pop(task, None)
        self._arrived.set()
        if task.cancelled():
            return
        if task.exception() is not None:
            self._error = self._error or task.exception()
            return
        group = task.result()
        if self._record is not None:
            self._record.add(group)
        self._sort(group)

    def _sort(self, group: SampleGroup) -> None:
        teaches = not self._rl.dynamic_sampling.on or self._teaches(group)
        whole = len(group.rollouts) >= FEWEST_SAMPLES
        if whole and teaches:
            self._ready.append(group)
        else:
            self._others.append(group)

    def _drop_stale(self, version: int) -> None:
        """Drop groups that have become too old; their prompts are asked again."""
        fresh = deque[SampleGroup]()
        for group in self._ready:
            if self._is_fresh(group, version):
                fresh.append(group)
            else:
                self._again.append(group.row)
                self._stale += 1
        self._ready = fresh

    def _is_fresh(self, group: SampleGroup, version: int) -> bool:
        return version - group.oldest <= self._staleness
