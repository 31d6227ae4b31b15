"""What a rank sends: the number of its collectives and their bytes, by name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sent:
    """Collectives of one name, and the bytes that the rank sent by them."""

    calls: int = 0
    bytes: int = 0


class Traffic:
    """Counts collectives. A name is `axis.kind`, such as `tp.sum`."""

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = {}

    def count(self, name: str, num_bytes: int) -> None:
        """One more collective."""
        before = self._sent.get(name, Sent())
        self._sent[name] = Sent(before.calls + 1, before.bytes + num_bytes)

    def sent(self) -> dict[str, Sent]:
        """All that was counted since the last `clear`."""
        return dict(self._sent)

    @property
    def calls(self) -> int:
        """Collectives of every name."""
        return sum(one.calls for one in self._sent.values())

    @property
    def bytes(self) -> int:
        """Bytes of every name."""
        return sum(one.bytes for one in self._sent.values())

    def clear(self) -> None:
        """Begin at zero again."""
        self._sent.clear()
