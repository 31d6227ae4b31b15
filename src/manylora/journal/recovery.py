"""A journal is read back: every record that can be read, and what cannot."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from manylora.journal.record_format import TORN, Record, read_segment
from manylora.types.files import tell_shortage_apart

_SEGMENT = re.compile(r"(\d{8})\.log")


@dataclass(frozen=True, slots=True)
class Damage:
    """A `Damage` is a place of the journal that cannot be read. `lost` is what the record there
    was, without its body, if its header can be read."""

    segment: str
    offset: int
    reason: str
    lost: Record | None = None


@dataclass
class Recovery:
    """A `Recovery` is what a journal contains.

    Attributes:
        records: in the order in which they were written, read during one iteration. Records
            that were covered or forgotten may be among them, and one may come twice: refused when
            it was first written, and the disk would not even take it back.
        damages: complete once `records` is at its end.
    """

    records: Iterator[Record]
    damages: list[Damage] = field(default_factory=list)


def recover(folder: str | Path) -> Recovery:
    """Read a journal. Nothing in it makes this raise, and nothing is changed.

    A record at the very end that is not complete was never acknowledged: it is left out silently.
    What else cannot be read is skipped, and listed in `damages`.
    """
    damages: list[Damage] = []

    def records() -> Iterator[Record]:
        paths = list(segments(Path(folder)).values())
        for path in paths:
            for found in read_segment(path):
                if not found.reason and found.record is not None:
                    yield found.record
                elif found.reason != TORN or path != paths[-1]:
                    damages.append(Damage(path.name, found.offset, found.reason, found.record))

    return Recovery(records(), damages)


def segments(folder: Path) -> dict[int, Path]:
    """Return number and file of each segment, the oldest first. Raises TooManyFilesOpen."""
    try:
        found = [(_SEGMENT.fullmatch(path.name), path) for path in folder.iterdir()]
    except OSError as error:
        tell_shortage_apart(error, folder)
        return {}
    return dict(sorted((int(match[1]), path) for match, path in found if match))
