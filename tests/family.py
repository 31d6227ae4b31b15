"""Processes and their children, read from /proc."""

from pathlib import Path


def below(pid: int) -> list[int]:
    """The living processes that descend from `pid`, parents before children."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        fields = _fields(int(place.name))
        if fields and fields[0] not in "ZX":
            parents[int(place.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def leaves_below(pid: int) -> list[int]:
    """Those that have no children: the processes of a server's engine."""
    own = below(pid)
    return [one for one in own if not below(one)]


def runs(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    fields = _fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
