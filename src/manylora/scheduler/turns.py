"""Turns go by start-time fair queueing (https://doi.org/10.1109/90.649569).

Each member has a tag, which grows by the cost of what it is served; the lowest tag is next. One
that joins gets at least the tag of the last one served, so none saves up turns while away, and
keeps a higher tag of its own, so none gets rid of what it owes by leaving. In the long run members
are served equal costs, as by deficit round robin. But a newcomer is next at once whatever its size,
and a turn costs O(log members), where deficits would have to be dealt to all of them.
"""

import heapq
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """`Turns` has the members that want a turn."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._entry: dict[Item, int] = {}  # the one entry of each member that counts
        self._tags: dict[Item, float] = {}  # of members, and of those that left owing something
        self._clock = 0.0
        self._number = 0

    def __len__(self) -> int:
        return len(self._entry)

    def __contains__(self, item: Item) -> bool:
        return item in self._entry

    def join(self, item: Item) -> None:
        """Let a member want turns from now on."""
        if item not in self._entry:
            self._tags[item] = max(self._tags.get(item, 0.0), self._clock)
            self._push(item)

    def leave(self, item: Item) -> None:
        """Let a member want no more turns for now."""
        self._entry.pop(item, None)
        if len(self._tags) > 2 * len(self._entry) + 64:
            self._tags = {
                i: tag for i, tag in self._tags.items() if tag > self._clock or i in self._entry
            }

    def first(self) -> Item | None:
        """Return the member whose turn it is; None if none wants one."""
        while self._heap:
            _, number, item = self._heap[0]
            if self._entry.get(item) == number:
                return item
            heapq.heappop(self._heap)
        return None

    def put_aside(self, item: Item) -> None:
        """Leave the first one out, until `put_back`."""
        del self._entry[item]

    def put_back(self, item: Item) -> None:
        """Let one that was put aside want turns again, with the tag that it had."""
        self._tags.setdefault(item, self._clock)
        self._push(item)

    def charge(self, item: Item, cost: float) -> None:
        """Add the cost of what a member was served; others that have its tag are next."""
        start = self._tags[item]
        if item == self.first():
            self._clock = max(self._clock, start)
        self._tags[item] = start + cost
        if item in self._entry:
            self._push(item)

    def tag(self, item: Item) -> float:
        """Return a member's tag."""
        return self._tags[item]

    def _push(self, item: Item) -> None:
        self._number += 1
        self._entry[item] = self._number
        heapq.heappush(self._heap, (self._tags[item], self._number, item))
