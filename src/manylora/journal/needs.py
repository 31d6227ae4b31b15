"""Some records are still needed, and so their segments must stay.

A record costs sixteen bytes here while it is needed, and nothing afterwards.
"""

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class _SegmentPart:
    """A `_SegmentPart` has a stream's needed records in one segment."""

    seqs: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass(slots=True)
class _Stream:
    covered: int | None = None
    parts: dict[int, _SegmentPart] = field(default_factory=dict)


class Needs:
    """`Needs` tell which records are still needed. They are not thread-safe."""

    def __init__(self) -> None:
        self.records = 0
        self.bytes = 0
        self._streams: dict[str, _Stream] = {}
        self._segments: dict[int, set[str]] = {}

    def add(self, segment: int, stream: str, seq: int, size: int) -> None:
        """A record was written."""
        if self.is_covered(stream, seq):
            return
        part = self._streams.setdefault(stream, _Stream()).parts.setdefault(segment, _SegmentPart())
        part.seqs.append(seq)
        part.sizes.append(size)
        self._segments.setdefault(segment, set()).add(stream)
        self.records += 1
        self.bytes += size

    def cover(self, stream: str, seq: int) -> None:
        """Nothing of the stream up to `seq` is needed, even if it is written later."""
        known = self._streams.setdefault(stream, _Stream())
        if known.covered is not None and known.covered >= seq:
            return
        known.covered = seq
        for segment, part in list(known.parts.items()):
            kept = [i for i, number in enumerate(part.seqs) if number > seq]
            self.records -= len(part.seqs) - len(kept)
            self.bytes -= sum(part.sizes) - sum(part.sizes[i] for i in kept)
            if kept:
                part.seqs = array("q", [part.seqs[i] for i in kept])
                part.sizes = array("q", [part.sizes[i] for i in kept])
            else:
                self._release(segment, stream)
                del known.parts[segment]

    def forget(self, stream: str) -> None:
        """Nothing of the stream that was written so far is needed."""
        known = self._streams.pop(stream, None)
        for segment, part in known.parts.items() if known else ():
            self.records -= len(part.seqs)
            self.bytes -= sum(part.sizes)
            self._release(segment, stream)

    def is_covered(self, stream: str, seq: int) -> bool:
        known = self._streams.get(stream)
        return known is not None and known.covered is not None and seq <= known.covered

    def streams(self) -> list[str]:
        """Return the streams of which something is needed."""
        return [name for name, known in self._streams.items() if known.parts]

    def streams_of(self, segment: int) -> set[str]:
        """Return the streams that need this segment."""
        return self._segments.get(segment, set())

    def _release(self, segment: int, stream: str) -> None:
        left = self._segments[segment]
        left.discard(stream)
        if not left:
            del self._segments[segment]
