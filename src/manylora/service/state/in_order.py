"""One training client's operations are ordered by their numbers, however they arrive.

A client numbers its operations from 1. They are sent concurrently, so a later one may arrive first
and waits for the gap to fill; a number that arrives again is the same operation.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

from manylora.types import DataError

Item = TypeVar("Item")

# Numbers whose contents are remembered, to tell a repeated submit from a changed one.
REMEMBERED = 1024


class InOrder(Generic[Item]):
    """`InOrder` takes items by number, and gives them out in order."""

    def __init__(self, next_seq: int = 1):
        self.next_seq = next_seq
        self._early: dict[int, Item] = {}
        self._digests: OrderedDict[int, str] = OrderedDict()

    @property
    def num_early(self) -> int:
        """So many items wait for a gap to fill."""
        return len(self._early)

    def early(self) -> list[tuple[int, Item]]:
        """Return the items that wait, by number."""
        return sorted(self._early.items())

    def is_repeated(self, seq: int, digest: str) -> bool:
        """Return whether this number has been seen, with the same contents. Raises DataError: it
        was used for something else."""
        known = self._digests.get(seq)
        if known is not None and known != digest:
            raise DataError(
                f"seq_id {seq} was used before, for a request with other contents; every request "
                "of a training client takes the next number"
            )
        return known is not None or seq < self.next_seq or seq in self._early

    def remember(self, seq: int, digest: str) -> None:
        """Note the contents of a number."""
        self._digests[seq] = digest
        while len(self._digests) > REMEMBERED:
            self._digests.popitem(last=False)

    def offer(self, seq: int, item: Item) -> list[tuple[int, Item]]:
        """Add an item; return those whose turn it is now, in order."""
        self._early[seq] = item
        ready: list[tuple[int, Item]] = []
        while self.next_seq in self._early:
            ready.append((self.next_seq, self._early.pop(self.next_seq)))
            self.next_seq += 1
        return ready

    def give_up(self) -> list[tuple[int, Item]]:
        """Take out what waits, as the gap will not fill, and go on after it."""
        waiting = self.early()
        if waiting:
            self.next_seq = waiting[-1][0] + 1
        self._early.clear()
        return waiting
