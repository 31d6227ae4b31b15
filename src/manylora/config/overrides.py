"""`--set a.b=c` changes a run file's data before it is checked."""

from typing import Any

from manylora.config.yaml_text import Document, KeyPath, read_value
from manylora.types import ConfigError


def apply_override(document: Document, text: str) -> None:
    """Apply one `a.b=c`, where c is YAML and a step of the path is a key, an index or a name.

    An item of a list is named by its number from 0 or, for an adapter, by its name
    (`adapters.reverse.optimizer.lr=1e-3`). Whether the path exists in a run file is checked later,
    with everything else; the document then says that the value came from here.
    """
    place = f"--set {text}"
    keys, equals, value_text = text.partition("=")
    parts = keys.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{place}: write path.to.key=value, such as token_budget=2048")
    try:
        value = read_value(value_text.strip())
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    if document.data is None:
        document.data = dict[str, Any]()
    _assign(document, parts, value, place)


def _assign(document: Document, parts: list[str], value: Any, place: str) -> None:
    owner: Any = document.data
    path: KeyPath = ()
    while True:
        key, taken = _step(owner, path, parts, place)
        parts = parts[taken:]
        path = (*path, key)
        if not parts:
            break
        inner = owner.get(key) if isinstance(owner, dict) else owner[key]
        if inner is None:
            inner = owner[key] = dict[str, Any]()
            document.places[path] = place
        owner = inner
    owner[key] = value
    for stale in [known for known in document.places if known[: len(path)] == path]:
        del document.places[stale]
    document.places[path] = place


def _step(owner: object, path: KeyPath, parts: list[str], place: str) -> tuple[Any, int]:
    """Return the key that `parts` goes on with, and how many of the parts it takes."""
    if isinstance(owner, dict):
        return parts[0], 1
    where = ".".join(map(str, path)) or "the file"
    if not isinstance(owner, list):
        raise ConfigError(
            f"{place}: {where} holds a plain value, so there is no {parts[0]!r} in it"
        )
    names = [item.get("name") if isinstance(item, dict) else None for item in owner]
    # A name may itself contain dots; the longest that fits is meant.
    for taken in range(len(parts), 0, -1):
        name = ".".join(parts[:taken])
        if name in names:
            return names.index(name), taken
    if parts[0].isdecimal() and int(parts[0]) < len(owner):
        return int(parts[0]), 1
    known = ", ".join(str(name) for name in names if name is not None)
    raise ConfigError(
        f"{place}: {where} has no {parts[0]!r}; it has {len(owner)} items, numbered from 0"
        + (f", named {known}" if known else "")
    )
