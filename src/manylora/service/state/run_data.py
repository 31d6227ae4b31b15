"""A submitted run's data were uploaded, or are files below the server's data folders."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from manylora.config import AdapterEntry, is_data_file
from manylora.runs.run_folder import AdapterPaths, write_text
from manylora.runs.sources import Source, read_source
from manylora.service.http_errors import TooLarge
from manylora.service.wire.run_messages import Data
from manylora.types import DataError, SaveFailed, Unsupported
from manylora.types.files import flush_path

Which = Literal["train", "eval"]
# What tells that a file has changed: its size, and when it was written (ns).
Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RunData:
    """`RunData` say where the data of one run are.

    Attributes:
        roots: folders in which files may be named.
        stamps: of files in them, as they were when the run was submitted; without one, the data
            were uploaded.
    """

    entry: AdapterEntry
    paths: AdapterPaths
    roots: Sequence[Path]
    stamps: dict[str, Stamp]

    def read(self, which: Which, between: Callable[[], None] | None = None) -> Source:
        """Return the examples. Places are named as the client named its files; `between` is called
        every few rows. Raises DataError: a line is wrong, or the file has changed since the run was
        submitted."""
        name = _named(self.entry, which)
        assert name is not None
        if which not in self.stamps:
            return read_source(str(_uploaded(self.paths, which)), name=name, between=between)
        path = find(self.roots, name)
        if _stamp(path) != self.stamps[which]:
            raise DataError(f"{name}: has changed since the run was submitted; submit it again")
        return read_source(str(path), name=name, between=between)

    def uploaded_bytes(self) -> int:
        """Return how many bytes were uploaded."""
        paths = [_uploaded(self.paths, which) for which in ("train", "eval")]
        return sum(path.stat().st_size for path in paths if path.exists())

    def forget(self) -> None:
        """Delete what was uploaded, and everything that only a run in progress needs."""
        for which in ("train", "eval"):
            _uploaded(self.paths, which).unlink(missing_ok=True)
        for folder in (self.paths.checkpoints, self.paths.final):
            shutil.rmtree(folder, ignore_errors=True)


def accept(
    entry: AdapterEntry, data: Data | None, paths: AdapterPaths, roots: Sequence[Path]
) -> dict[str, Stamp]:
    """Make uploaded data durable, or find the files that the entry names; return the stamps for
    `RunData`. Raises DataError: no such file; Unsupported: something that a server does not read;
    SaveFailed."""
    if data is None:
        names = {which: _named(entry, which) for which in ("train", "eval")}
        return {
            which: _stamp(find(roots, name)) for which, name in names.items() if name is not None
        }
    if (_named(entry, "eval") is None) != (data.eval is None):
        raise DataError("sft.eval and data.eval go together: name the data and send them")
    try:
        for which, text in (("train", data.train), ("eval", data.eval)):
            if text is not None:
                write_text(_uploaded(paths, which), text)
        flush_path(paths.root)
        flush_path(paths.root.parent)
    except UnicodeEncodeError as error:
        raise DataError(f"data: half of a surrogate pair at character {error.start + 1}") from error
    except OSError as error:
        raise SaveFailed(f"the run's data cannot be stored: {error.strerror}") from error
    return {}


def find(roots: Sequence[Path], name: str) -> Path:
    """Find a data file by its path below one of the roots; links that lead out are not followed.
    Raises DataError: there is none; Unsupported: a hub id."""
    if not is_data_file(name):
        raise Unsupported(f"{name}: a server loads nothing from a hub; send the data with the run")
    relative = PurePosixPath(name)
    if not relative.is_absolute() and "\0" not in name:
        for root in roots:
            path = (root / relative).resolve()
            if path.is_relative_to(root.resolve()) and path.is_file():
                return path
    raise DataError(
        f"{name}: there is no such file in the server's data folders; a path is relative to one of "
        "them. Or send the data with the run"
    )


def check_size(entry: AdapterEntry, max_rank: int) -> None:
    """Refuse what a shared server does not take. Raises TooLarge: the rank; Unsupported: files of
    the server, or what can take for ever: regular expressions, templates, and users' code."""
    if entry.sft is None:
        raise Unsupported(
            f"{entry.kind}: a server trains by sft; rewards and hooks are programs, and it runs "
            "none of its users': train with `manylora train`, or sample and step through its API"
        )
    lora = entry.lora
    for rank in (lora.rank, *lora.rank_pattern.values()):
        if rank > max_rank:
            raise TooLarge(f"lora.rank is {rank}; at most {max_rank} here")
    if lora.init_from is not None:
        raise Unsupported("lora.init_from names a folder of the server; leave it out")
    if entry.chat_template is not None:
        raise Unsupported(
            "chat_template: a template is a program, and a server runs none but its base's; render "
            "the conversations yourself and send prompt/completion rows"
        )
    if entry.checkpoints is not None:
        raise Unsupported("checkpoints: a server keeps the newest state of a run; leave it out")
    names = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    for name in (*names, *lora.rank_pattern, *lora.alpha_pattern):
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise Unsupported(
                f"lora: {name[:64]!r} is a regular expression, and a server takes none; list the "
                "layers' names"
            )


def _named(entry: AdapterEntry, which: Which) -> str | None:
    return entry.kind_settings.sources().get(which)


def _uploaded(paths: AdapterPaths, which: Which) -> Path:
    return paths.root / f"{which}.jsonl"


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
