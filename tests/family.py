"""These functions read processes and their children from /proc."""

from pathlib import Path


def below(pid: int) -> list[int]:
    """Return the living processes that descend from `pid`, parents before children."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        fields = _fields(int(place.name))
        if fields and fields[0] not in "ZX":
            parents[int(place.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def engine_processes(pid: int) -> list[int]:
    """Return the engine's processes of this control process: its launcher's children."""
    launchers = _children([pid])
    return _children(launchers)


def runs(pid: int) -> bool:
    """Return whether the process exists and is no zombie."""
    fields = _fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def _children(pids: list[int]) -> list[int]:
    places = (int(place.name) for place in Path("/proc").glob("[0-9]*"))
    fields = {pid: _fields(pid) for pid in places}
    return [p for p, f in fields.items() if f and f[0] not in "ZX" and int(f[1]) in pids]


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
