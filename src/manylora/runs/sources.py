"""Training examples come from a local file (JSON Lines, CSV, Parquet) or a hub dataset.

JSON Lines and CSV, packed with gzip or not, are read here, not by the `datasets` library, whose
errors do not name the line, and whose cache takes a file for unchanged when its modification time
is. Parquet files are streamed through the library, which caches nothing; hub datasets are
cached by their revision. What a row may say is in `data_rows`.
"""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from manylora.config import DATA_SUFFIXES, data_suffix, is_data_file
from manylora.runs.data_rows import (
    FORMS,
    Example,
    Kind,
    ignored_columns,
    kind_of,
    read_example,
    without_nulls,
)
from manylora.types import DataError
from manylora.types.files import tell_shortage_apart

READ_HERE = f"{', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]}"
# A cell of a CSV file may hold a long text; the module's own limit is 128 KiB.
_LONGEST_CELL = 2**31 - 1

# Rows between two looks at whether others wait.
ROWS_BETWEEN = 256
# Line (or row) and what stands there.
Rows = Iterator[tuple[int, object]]
Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Source:
    """A `Source` is all examples of a data source, of one kind, and what to call their places.

    Attributes:
        ignored: columns that are there and are not used.
    """

    name: str
    kind: Kind
    examples: Sequence[Example]
    unit: Unit = "line"
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, example: Example) -> str:
        """Return where an example stands (`data/reverse.jsonl:7`)."""
        return place_of(self.name, self.unit, example.line)


def read_source(
    source: str, *, name: str | None = None, between: Callable[[], None] | None = None
) -> Source:
    """Read and check every row.

    Args:
        source: a local file, or a hub id `org/name` or `org/name:split` (the split is `train`
            unless given).
        name: what messages call it; by default as `source` does.

    Raises:
        DataError: nothing there, or a row that is wrong; names the file, the line, what is wrong
            and what would be right.
    """
    name = source if name is None else name
    unit, rows = read_rows(source, name)
    return _collect(name, unit, rows, between)


def read_rows(source: str, name: str, forms: str = FORMS) -> tuple[Unit, Rows]:
    """Return the rows of a source as they stand there, and what to call their numbers.

    Args:
        source: as `read_source` takes it.
        name: what messages call it.
        forms: what a row looks like, for a message about one that is not JSON.

    Raises:
        DataError: nothing there; and, at any row, that it cannot be read.
    """
    if not is_data_file(source):
        return "row", _hub_rows(source)
    path, suffix = Path(source), data_suffix(source)
    if suffix not in DATA_SUFFIXES:
        raise DataError(f"{name}: of local files {READ_HERE} are read; write it as one of those")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"{name}: {what}; name a {READ_HERE} file, or a hub id")
    if suffix == ".parquet":
        return "row", _parquet_rows(source, name)
    read = _csv_rows if suffix.startswith(".csv") else partial(_json_lines, forms=forms)
    return "line", _of_file(path, name, read)


def place_of(name: str, unit: Unit, line: int) -> str:
    """Return where a row stands (`data/reverse.jsonl:7`)."""
    return f"{name}:{line}" if unit == "line" else f"{name}, row {line}"


def _collect(name: str, unit: Unit, rows: Rows, between: Callable[[], None] | None) -> Source:
    kind: Kind | None = None
    first_line = 0
    examples: list[Example] = []
    ignored: set[str] = set()
    for line, row in rows:
        if between is not None and len(examples) % ROWS_BETWEEN == ROWS_BETWEEN - 1:
            between()
        try:
            this_kind = kind_of(row)
            if kind is None:
                kind, first_line = this_kind, line
            if this_kind != kind:
                raise DataError(
                    f"is a {this_kind} row, but {unit} {first_line} is a {kind} row; keep one kind "
                    "per file"
                )
            assert isinstance(row, Mapping)
            ignored |= ignored_columns(row, kind)
            examples.append(read_example(line, kind, row))
        except DataError as error:
            raise DataError(f"{place_of(name, unit, line)}: {error}") from error
    if kind is None:
        raise DataError(f"{name}: has no rows; {FORMS}")
    return Source(name, kind, examples, unit, tuple(sorted(ignored)))


# -- files that are read here ---------------------------------------------------------------------


def _of_file(path: Path, name: str, read: Callable[[BinaryIO, str], Rows]) -> Rows:
    """Yield the rows of a file, unpacked on the way."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() != ".gz":
                yield from read(file, name)
                return
            with gzip.GzipFile(fileobj=file) as unpacked:
                # A zip file's reader is a binary stream like any other.
                yield from read(unpacked, name)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: is not a whole gzip file: {_first_line(error)}") from error
    except OSError as error:
        tell_shortage_apart(error, name)
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _json_lines(file: BinaryIO, name: str, forms: str) -> Rows:
    for line, raw in enumerate(file, start=1):
        # Some editors begin a file with a byte order mark.
        content = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        if content.strip():
            yield line, _parse(f"{name}:{line}", content, forms)


def _parse(place: str, raw: bytes, forms: str) -> object:
    try:
        return json.loads(raw.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        hint = "; write one JSON object per line" if raw.strip() in (b"[", b"{") else ""
        raise DataError(
            f"{place}: is not JSON: {error.msg} at column {error.colno}{hint or f'; {forms}'}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: is nested too deeply; {forms}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{place}: cannot be read: {_first_line(error)}") from error


def _csv_rows(file: BinaryIO, name: str) -> Rows:
    """Yield a table's rows by its line of titles, without cells that are empty, except a text's."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(_decoded(file, name), strict=True)
    titles: list[str] | None = None
    before = 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num
            if not any(cells):
                continue
            if titles is None:
                titles = _titles(cells, f"{name}:{line}")
                continue
            if len(cells) != len(titles):
                raise DataError(
                    f"{name}:{line}: has {len(cells)} cells; the titles in the first line are "
                    f"{len(titles)}"
                )
            yield (
                line,
                {
                    title: _cell(title, cell)
                    for title, cell in zip(titles, cells, strict=True)
                    if cell or title in ("prompt", "completion", "text")
                },
            )
    except csv.Error as error:
        raise DataError(f"{name}:{before + 1}: is not CSV: {error}") from error


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    for line, raw in enumerate(file, start=1):
        try:
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{name}:{line}"
            raise DataError(f"{where}: is not UTF-8 text (byte {error.start + 1})") from error


def _titles(cells: Sequence[str], place: str) -> list[str]:
    titles = [cell.strip() for cell in cells]
    if len(set(titles)) < len(titles):
        twice = next(title for title in titles if titles.count(title) > 1)
        raise DataError(f"{place}: has two columns {twice!r}; titles must differ")
    return titles


def _cell(title: str, cell: str) -> object:
    """Messages are lists, which a cell can only hold as JSON; a prompt is text in any case."""
    if title != "messages":
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # and the row is told what it should be


# -- files and tables that a library reads --------------------------------------------------------


def _parquet_rows(source: str, name: str) -> Rows:
    def load() -> Iterable[object]:
        import datasets

        # Streaming reads the file itself: no copy in the cache that could be out of date.
        return datasets.load_dataset(
            "parquet", data_files=os.path.abspath(source), split="train", streaming=True
        )

    return _table_rows(load, f"{name}: cannot be read as Parquet: ", "")


def _hub_rows(source: str) -> Rows:
    def load() -> Iterable[object]:
        import datasets

        name, _, split = source.partition(":")
        return datasets.load_dataset(name, split=split or "train")

    remedy = (
        ". Check its name and split and the network; a local file must end in "
        f"{READ_HERE}, or begin with ./"
    )
    return _table_rows(load, f"{source}: cannot load this dataset from the hub: ", remedy)


def _table_rows(load: Callable[[], Iterable[object]], complaint: str, remedy: str) -> Rows:
    """Yield a table's rows; whatever a library raises, at any of them, is the source's fault."""
    try:
        for number, row in enumerate(load(), start=1):
            yield number, without_nulls(row)
    except Exception as error:
        raise DataError(f"{complaint}{_first_line(error)}{remedy}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
