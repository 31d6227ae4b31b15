"""Traffic is what a rank sends: the number of its collectives and their bytes, by name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sent:
    """A `Sent` counts collectives of one name, and the bytes that the rank sent by them."""

    calls: int = 0
    bytes: int = 0


class Traffic:
    """A `Traffic` counts collectives. A name is `axis.kind`, such as `tp.sum`."""

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = {}

    def count(self, name: str, num_bytes: int) -> None:
        """Count one more collective."""
        before = self._sent.get(name, Sent())
        self._sent[name] = Sent(before.calls + 1, before.bytes + num_bytes)

    def sent(self) -> dict[str, Sent]:
        """Return all that was counted since the last `clear`."""
        return dict(self._sent)

    @property
    def calls(self) -> int:
        """All names together have this many collectives."""
        return sum(one.calls for one in self._sent.values())

    @property
    def bytes(self) -> int:
        """All names together have this many bytes."""
        return sum(one.bytes for one in self._sent.values())

    def clear(self) -> None:
        """Begin at zero again."""
        self._sent.clear()
