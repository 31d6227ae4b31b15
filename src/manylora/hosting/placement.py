"""A placement tells with which of several engines an adapter or a snapshot lives."""

import threading

from manylora.scheduler import Operation
from manylora.types import ForwardBackward, Sample


class Placement:
    """A placement has the number of the engine with which each adapter and each snapshot lives.

    An adapter that is new goes where fewest are, and stays there; a snapshot is made where its
    adapter lives. What belongs to neither goes to each engine in turn. A placement is thread-safe.
    """

    def __init__(self, num_engines: int):
        """Nothing lives anywhere yet."""
        self._lock = threading.Lock()
        self._adapters, self._snapshots = _Homes(num_engines), _Homes(num_engines)
        self._turn, self._num_engines = 0, num_engines

    def of_operation(self, operation: Operation) -> int:
        """Return the engine that is to run an operation."""
        snapshot = operation.snapshot if isinstance(operation, Sample | ForwardBackward) else None
        if snapshot is None:
            return self.of_adapter(operation.adapter)
        with self._lock:
            if snapshot in self._snapshots.numbers or operation.adapter is None:
                return self._number(self._snapshots, snapshot)
            return self._number(self._adapters, operation.adapter)

    def of_adapter(self, adapter: str | None) -> int:
        """Return the engine with which an adapter lives; with None, the one whose turn it is."""
        with self._lock:
            return self._next() if adapter is None else self._number(self._adapters, adapter)

    def forget_adapter(self, adapter: str) -> int:
        """Forget an adapter; return the engine with which it has lived until now."""
        with self._lock:
            number = self._number(self._adapters, adapter)
            self._adapters.remove(adapter)
            return number

    def add_snapshot(self, snapshot: str, adapter: str) -> int:
        """Return the engine that is to make a snapshot of an adapter."""
        with self._lock:
            number = self._number(self._adapters, adapter)
            self._snapshots.put(snapshot, number)
            return number

    def forget_snapshot(self, snapshot: str) -> int:
        """Forget a snapshot; return the engine with which it has lived until now."""
        with self._lock:
            number = self._number(self._snapshots, snapshot)
            self._snapshots.remove(snapshot)
            return number

    def _number(self, homes: "_Homes", name: str) -> int:
        if name not in homes.numbers:
            first, count = self._next(), self._num_engines
            fewest = min(range(count), key=lambda i: (homes.counts[i], (i - first) % count))
            homes.put(name, fewest)
        return homes.numbers[name]

    def _next(self) -> int:
        self._turn = (self._turn + 1) % self._num_engines
        return self._turn


class _Homes:
    """`_Homes` tell where each adapter, or each snapshot, lives, and how many an engine has."""

    def __init__(self, num_engines: int):
        self.numbers: dict[str, int] = {}
        self.counts = [0] * num_engines

    def put(self, name: str, number: int) -> None:
        self.remove(name)
        self.numbers[name] = number
        self.counts[number] += 1

    def remove(self, name: str) -> None:
        if name in self.numbers:
            self.counts[self.numbers.pop(name)] -= 1
