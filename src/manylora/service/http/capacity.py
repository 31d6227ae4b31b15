"""Several share a capacity, and none may take all of it: it is counted before it is taken."""

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address

from manylora.service.http_errors import Backpressure


class Capacity:
    """A `Capacity` is so much in all and for each owner. It belongs to the event loop's thread."""

    def __init__(self, most: int, most_each: int, what: str):
        """Call what is held `what` in the words of the refusal."""
        self.most, self.most_each = most, min(most_each, most)
        self._what = what
        self.held = 0  # by all together
        self._held_by: dict[str, int] = {}

    @contextmanager
    def holding(self, *owners: str) -> "Iterator[Held]":
        """Give the body something that grows, and is free again at the end."""
        held = Held(self, owners)
        try:
            yield held
        finally:
            held.shrink()

    def take(self, count: int, owners: tuple[str, ...]) -> None:
        """Take `count`; raise Backpressure, with nothing taken, if there is not so much left."""
        if self.held + count > self.most:
            raise Backpressure(
                f"the server has {self.held:,} {self._what}, and {self.most:,} is the limit; "
                "try again soon"
            )
        for owner in owners:
            held = self._held_by.get(owner, 0)
            if held + count > self.most_each:
                raise Backpressure(
                    f"{owner} has {held:,} {self._what}, {count:,} more would be beyond the "
                    f"limit of {self.most_each:,}; try again when some are done"
                )
        self.held += count
        for owner in owners:
            self._held_by[owner] = self._held_by.get(owner, 0) + count

    def give(self, count: int, owners: tuple[str, ...]) -> None:
        """Give back what was taken."""
        self.held -= count
        for owner in owners:
            left = self._held_by[owner] - count
            if left:
                self._held_by[owner] = left
            else:
                del self._held_by[owner]


class Held:
    """A `Held` is what one request holds of a capacity."""

    def __init__(self, room: Capacity, owners: tuple[str, ...]):
        self.count = 0
        self._room, self._owners = room, owners

    def grow(self, count: int) -> None:
        """Hold `count` in all; less than now changes nothing. Raises Backpressure: there is no room
        for it."""
        more = count - self.count
        if more > 0:
            self._room.take(more, self._owners)
            self.count = count

    def shrink(self) -> None:
        """Hold nothing."""
        if self.count:
            self._room.give(self.count, self._owners)
            self.count = 0


def neighbourhood(host: str) -> str:
    """Return what counts as one address; of IPv6 a network, which one machine may have."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64)) + "/64"
