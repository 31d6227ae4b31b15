"""What the tests of the journal share."""

from pathlib import Path
from typing import Any

from manylora.journal import Journal, Record

LIMIT = 20.0


def record(stream: str = "s", seq: int = 1, body: bytes = b"body", **more: Any) -> Record:
    fields: dict[str, Any] = {
        "kind": "forward_backward",
        "tenant": "ann",
        "request_id": f"{stream}:{seq}",
        "digest": "d",
    }
    return Record(stream, seq, body=body, **(fields | more))


def write(journal: Journal, *records: Record) -> None:
    """One after another, so that no two share a flush."""
    for one in records:
        journal.append(one).result(LIMIT)


def contents(folder: Path) -> list[Record]:
    recovery = Journal.recover(folder)
    records = list(recovery.records)
    assert recovery.damages == []
    return records


def disk_bytes(journal: Journal) -> int:
    """What a journal believes that its segments take on the disk."""
    return sum(journal._sizes.values())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")
