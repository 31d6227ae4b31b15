"""The table of open connections knows who has to go when there are too many.

A connection *waits* until it has sent a request that may be served, and after each answer. One that
waits can be closed for a newcomer's sake, the one that has waited longest first: so a client that
sends its request at once is served, however many others only hold connections open.
"""

import resource
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from manylora.service.http.capacity import neighbourhood
from manylora.types import ConfigError

Peer = tuple[str, int]

# Descriptors that are kept for files, the database and the engine's processes; of few, half.
RESERVED = 128
FEWEST = 8


@dataclass(eq=False, slots=True)
class Line:
    """A `Line` is one connection.

    Attributes:
        close: ends it at once; None until its protocol runs.
        gone: it was closed for another's sake.
    """

    peer: Peer
    address: str
    close: Callable[[], None] | None = None
    gone: bool = False


@dataclass(slots=True)
class _Address:
    num: int = 0
    waiting: OrderedDict[Peer, Line] = field(default_factory=OrderedDict)


class OpenConnections:
    """`OpenConnections` belong to the event loop's thread."""

    def __init__(self, most: int, most_each: int):
        """Let `most` be open at once, and `most_each` of one address."""
        self.most, self.most_each = most, most_each
        self._lines: dict[Peer, Line] = {}
        self._addresses: dict[str, _Address] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def admit(self, peer: Peer) -> bool:
        """Count a connection just accepted; False: every other is at work, and it must go."""
        name = neighbourhood(peer[0])
        address = self._addresses.setdefault(name, _Address())
        if address.num >= self.most_each:
            made_room = self._close_one(address)
        elif len(self._lines) >= self.most:
            made_room = self.close_longest()
        else:
            made_room = True
        if made_room:
            self._lines[peer] = line = Line(peer, name)
            self._addresses.setdefault(name, address).num += 1
            address.waiting[peer] = line
        elif not address.num:
            self._addresses.pop(name, None)
        return made_room

    def opened(self, peer: Peer, close: Callable[[], None]) -> Line | None:
        """Return an admitted connection's line once its protocol runs; None: it has to go."""
        line = self._lines.get(peer)
        if line is not None:
            line.close = close
        return line

    def find(self, peer: Peer | None) -> Line | None:
        """Return the line of an open connection."""
        return None if peer is None else self._lines.get(peer)

    def works(self, line: Line) -> None:
        """Note that its request is being served: it stays."""
        self._addresses[line.address].waiting.pop(line.peer, None)

    def waits(self, line: Line) -> None:
        """Note that a connection waits from now on."""
        if not line.gone:
            waiting = self._addresses[line.address].waiting
            waiting[line.peer] = line
            waiting.move_to_end(line.peer)

    def closed(self, line: Line) -> None:
        """Forget a connection that is closed."""
        if line.gone:
            return
        line.gone = True
        del self._lines[line.peer]
        address = self._addresses[line.address]
        address.num -= 1
        address.waiting.pop(line.peer, None)
        if not address.num:
            del self._addresses[line.address]

    def close_longest(self) -> bool:
        """Close the longest waiting one of the address where most wait; False: none waits."""
        if not self._addresses:
            return False
        return self._close_one(max(self._addresses.values(), key=lambda one: len(one.waiting)))

    def _close_one(self, address: _Address) -> bool:
        if not address.waiting:
            return False
        line = next(iter(address.waiting.values()))
        self.closed(line)
        if line.close is not None:
            line.close()
        return True


def room_for(wanted: int, others: int) -> int:
    """Return how many connections may be open at once, with a descriptor kept for each of `others`,
    which are processes. The limit of open files is raised as far as is needed and allowed. Raises
    ConfigError: the system allows too few open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = _num_open() + others
    needed = wanted + used + RESERVED
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    else:
        limit = needed if soft == resource.RLIM_INFINITY else soft
    most = min(wanted, limit - used - min(RESERVED, limit // 2))
    if most < min(FEWEST, wanted):
        raise ConfigError(
            f"this process may have {limit} files open and needs {used + RESERVED + FEWEST} at "
            "least; raise the limit (ulimit -n) and start again"
        )
    return most


def _num_open() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if Path(folder).is_dir():
            return sum(1 for _ in Path(folder).iterdir())
    return 32
