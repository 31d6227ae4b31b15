"""Some of many things are held in fast memory: the least recently used make room.

It serves adapters on the device, states in host memory and snapshots; it knows names and bytes
only.
"""

from collections import OrderedDict
from collections.abc import Collection


class Residency:
    """A residency holds names with their sizes, in the order of their last use."""

    def __init__(self, *, max_count: int | None = None, max_bytes: int | None = None):
        """Nothing is held yet. `None` is no such limit; one thing may be held whatever its size."""
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def names(self, keep: Collection[str] = ()) -> list[str]:
        """Return what is held and not of `keep`, least recently used first."""
        return [name for name in self._sizes if name not in keep]

    def size(self, name: str) -> int:
        """Return how many bytes are held."""
        return self._sizes[name]

    def use(self, name: str, num_bytes: int | None = None) -> None:
        """Note that `name` is held and was just used; `num_bytes` when its size is new."""
        if num_bytes is not None:
            self.num_bytes += num_bytes - self._sizes.get(name, 0)
            self._sizes[name] = num_bytes
        self._sizes.move_to_end(name)

    def drop(self, name: str) -> None:
        """Note that `name` is held no longer."""
        self.num_bytes -= self._sizes.pop(name, 0)

    def excess(self, keep: Collection[str] = (), *, incoming: int = 0) -> list[str]:
        """Return what has to go, least recently used first, before `incoming` bytes of one more
        thing can be held; nothing of `keep`, even if the limits are then exceeded."""
        count = len(self._sizes) + (1 if incoming else 0)
        held = self.num_bytes + incoming
        victims: list[str] = []
        for name, size in self._sizes.items():
            if not self._over(count, held):
                break
            if name not in keep:
                victims.append(name)
                count, held = count - 1, held - size
        return victims

    def _over(self, count: int, held: int) -> bool:
        too_many = self.max_count is not None and count > self.max_count
        return too_many or (self.max_bytes is not None and held > self.max_bytes and count > 1)
