"""A manifest says what its folder is: kind, what it belongs to, and the SHA-256 of every file.

The manifest is written last, so a folder without one was never finished. It carries a checksum of
itself, because an altered base name or layout is as bad as an altered tensor.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from manylora.types import CheckpointDamaged, CheckpointMismatch
from manylora.types.files import tell_shortage_apart

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

FORMAT = 1
MANIFEST = "manifest.json"
# A manifest's name beside files that other programs read; it says whose it is.
SIDECAR = "manylora.json"
# Kind of a base with an adapter added to it.
MERGED = "merged-model"

# Limits of a JSON file: the layout of a model with a hundred thousand layers, and no more.
MAX_JSON_BYTES = 32 << 20
MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Manifest:
    """A `Manifest` was read from a file, and its own checksum is right.

    Attributes:
        kind: `training-state`, `peft-adapter` or `merged-model`.
        about: what the writer said of the contents (base, layout, …).
        files: relative path → (bytes, SHA-256 in hex).
    """

    kind: str
    about: dict[str, JSON]
    files: dict[str, tuple[int, str]]


def manifest_text(kind: str, about: Mapping[str, JSON], partial: Path) -> str:
    """Return the manifest of everything that lies in `partial` now."""
    files: dict[str, JSON] = {
        path.relative_to(partial).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    body: dict[str, JSON] = {"format": FORMAT, "kind": kind, "about": dict(about), "files": files}
    return json.dumps({**body, "sha256": _checksum(body)}, indent=1) + "\n"


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read the manifest of `folder` without looking at the files that it lists.

    Raises:
        CheckpointDamaged: it is missing, torn or altered.
        CheckpointMismatch: it was written in another format version.
    """
    body = read_object(folder / name)
    told = body.pop("sha256", None)
    if told != _checksum(body):
        raise CheckpointDamaged(f"{folder / name} was altered: its own checksum is wrong")
    if body.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"{folder / name} has format version {body.get('format')}; this manylora reads {FORMAT}"
        )
    kind, about, listed = body.get("kind"), body.get("about"), body.get("files")
    if not (isinstance(kind, str) and isinstance(about, dict) and isinstance(listed, dict)):
        raise CheckpointDamaged(f"{folder / name} lacks 'kind', 'about' or 'files'")
    return Manifest(
        kind, about, {path: _record(folder / name, path, r) for path, r in listed.items()}
    )


def verify(folder: Path, name: str = MANIFEST, *, kind: str | None = None) -> Manifest:
    """Read the manifest and compare every file that it lists with it.

    Raises:
        CheckpointDamaged: a file is missing, of another size or altered; all such are named.
        CheckpointMismatch: the manifest has another format version, or is not of `kind`.
        TooManyFilesOpen: no descriptor is left, so the files could not be read.
    """
    manifest = read_manifest(folder, name)
    if kind is not None and manifest.kind != kind:
        raise CheckpointMismatch(f"{folder} holds a {manifest.kind}, not a {kind}")
    faults = [
        f"{path} {fault}"
        for path, record in manifest.files.items()
        if (fault := _fault(folder / path, *record))
    ]
    if faults:
        raise CheckpointDamaged(f"{folder} is damaged: {'; '.join(faults)}")
    return manifest


def read_object(path: Path, most_bytes: int = MAX_JSON_BYTES) -> dict[str, JSON]:
    """Read the JSON object in a file.

    Raises:
        CheckpointDamaged: the file is missing, unreadable, too large, or no JSON object.
        TooManyFilesOpen: no descriptor is left, so the file could not be read.
    """
    try:
        value = json.loads(_text(path, most_bytes))
        _check_depth(value)
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{path.parent} is incomplete: {path.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        tell_shortage_apart(error, path)
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{path} is not a JSON object")
    return value


def _text(path: Path, most_bytes: int) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return content.decode()


def _check_depth(value: object) -> None:
    layer: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return
        layer = inner
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(body: Mapping[str, JSON]) -> str:
    return hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()


def _record(manifest: Path, path: str, record: JSON) -> tuple[int, str]:
    pure = PurePosixPath(path)
    if isinstance(record, dict) and not pure.is_absolute() and ".." not in pure.parts:
        size, digest = record.get("bytes"), record.get("sha256")
        if isinstance(size, int) and isinstance(digest, str):
            return size, digest
    raise CheckpointDamaged(f"{manifest} has no valid record of {path!r}")


def _fault(path: Path, size: int, digest: str) -> str | None:
    try:
        if path.exists() and not path.is_file():
            return "is no file"
        found = path.stat().st_size
        if found != size:
            return f"has {found} bytes instead of {size}"
        return None if sha256_of(path) == digest else "was altered (its SHA-256 is wrong)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        tell_shortage_apart(error, path)
        return f"cannot be read ({error})"
