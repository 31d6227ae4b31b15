"""Training examples from a .jsonl file, a .parquet file or a hub dataset.

Three kinds of rows, one kind per source; other columns are ignored:

    {"prompt": "2+2=", "completion": "4"}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"text": "2+2=4"}

A JSON Lines file is read here, not by the `datasets` library: that one's errors do not name the
line, and its cache takes a file for unchanged when its modification time is. Parquet files are
streamed through the library, which caches nothing; hub datasets are cached by their revision.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manylora.config import is_data_file
from manylora.types import DataError

Kind = Literal["prompt/completion", "messages", "text"]
FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
FORMS = (
    'a row is {"prompt": …, "completion": …}, {"messages": [{"role": …, "content": …}, …]} or '
    '{"text": …}'
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: `texts` holds prompt and completion, or the text; else there are `messages`."""

    line: int
    texts: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """All examples of a data source, which are of one kind, and what to call their places."""

    name: str
    kind: Kind
    examples: Sequence[Example]
    unit: Literal["line", "row"] = "line"

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, example: Example) -> str:
        """Where an example stands (`data/reverse.jsonl:7`)."""
        return _place(self.name, self.unit, example.line)


def read_source(source: str, *, name: str | None = None) -> Source:
    """Read and check every row.

    Args:
        source: a .jsonl or .parquet file, or a hub id `org/name` or `org/name:split` (the split is
            `train` unless given).
        name: what messages call it; by default as `source` does.

    Raises:
        DataError: nothing there, or a row that is wrong; names the file, the line, what is wrong
            and what would be right.
    """
    name = source if name is None else name
    if not is_data_file(source):
        return _collect(name, "row", enumerate(_hub_rows(source), start=1))
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"{name}: {what}; name a .jsonl or .parquet file, or a hub id")
    if path.suffix.lower() == ".parquet":
        return _collect(name, "row", enumerate(_parquet_rows(source, name), start=1))
    return _collect(name, "line", _json_lines(path, name))


def _place(name: str, unit: str, line: int) -> str:
    return f"{name}:{line}" if unit == "line" else f"{name}, row {line}"


def _collect(name: str, unit: Literal["line", "row"], rows: Iterable[tuple[int, object]]) -> Source:
    kind: Kind | None = None
    first_line = 0
    examples: list[Example] = []
    for line, row in rows:
        try:
            this_kind = _kind_of(row)
            if kind is None:
                kind, first_line = this_kind, line
            if this_kind != kind:
                raise DataError(
                    f"is a {this_kind} row, but {unit} {first_line} is a {kind} row; keep one kind "
                    "per file"
                )
            assert isinstance(row, Mapping)
            examples.append(_example(line, this_kind, row))
        except DataError as error:
            raise DataError(f"{_place(name, unit, line)}: {error}") from error
    if kind is None:
        raise DataError(f"{name}: has no rows; {FORMS}")
    return Source(name, kind, examples, unit)


def _json_lines(path: Path, name: str) -> Iterator[tuple[int, object]]:
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                # Some editors begin a file with a byte order mark.
                content = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if content.strip():
                    yield line, _parse(f"{name}:{line}", content)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def _parse(place: str, raw: bytes) -> object:
    try:
        return json.loads(raw.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        hint = "; write one JSON object per line" if raw.strip() in (b"[", b"{") else ""
        raise DataError(
            f"{place}: is not JSON: {error.msg} at column {error.colno}{hint or f'; {FORMS}'}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: is nested too deeply; {FORMS}") from error


def _parquet_rows(source: str, name: str) -> Iterator[object]:
    import datasets
    import pyarrow

    try:
        # Streaming reads the file itself: no copy in the cache that could be out of date.
        yield from datasets.load_dataset(
            "parquet", data_files=os.path.abspath(source), split="train", streaming=True
        )
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{name}: cannot be read as Parquet: {_first_line(error)}") from error


def _hub_rows(source: str) -> Iterable[object]:
    import datasets

    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    # Whatever goes wrong between here and the hub, the user's next step is the same.
    except Exception as error:
        raise DataError(
            f"{source}: cannot load this dataset from the hub: {_first_line(error)}. Check "
            "its name and split and the network; a local file must end in .jsonl or .parquet"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _kind_of(row: object) -> Kind:
    if not isinstance(row, Mapping):
        raise DataError(f"is {_described(row)}, not an object; {FORMS}")
    # Parquet and the hub give every column to every row; null stands for absent.
    present = {key for key, value in row.items() if value is not None}
    complete = [kind for kind, fields in FIELDS.items() if present.issuperset(fields)]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise DataError(f"is {' and '.join(complete)} at once; keep the fields of one kind")
    if "completion" in present or "prompt" in present:
        missing = "prompt" if "completion" in present else "completion"
        raise DataError(f"has no {missing!r}; {FORMS}")
    have = f"has only {', '.join(map(repr, sorted(map(str, row))))}" if row else "is empty"
    raise DataError(f"{have}; {FORMS}")


def _example(line: int, kind: Kind, row: Mapping[str, Any]) -> Example:
    if kind == "messages":
        return Example(line, messages=_messages(row["messages"]))
    texts = tuple(_text(repr(field), row[field]) for field in FIELDS[kind])
    if not texts[-1]:
        field = FIELDS[kind][-1]
        raise DataError(f"{field!r} is empty, so there is nothing to learn; drop the row")
    return Example(line, texts=texts)


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            f"'messages' is {_described(value)}; it must be a list of "
            '{"role": …, "content": …} that is not empty'
        )
    messages = tuple(_message(number, item) for number, item in enumerate(value))
    if all(message.role != "assistant" for message in messages):
        raise DataError("'messages' has no turn of role 'assistant', so there is nothing to learn")
    return messages


def _message(number: int, item: object) -> Message:
    where = f"messages[{number}]"
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {_described(item)}; it must be {{'role': …, 'content': …}}")
    extra = [key for key, value in item.items() if key not in ("role", "content") and value]
    if extra:
        raise DataError(f"{where} has {extra[0]!r}, which is not supported; keep role and content")
    for field in ("role", "content"):
        if item.get(field) is None:
            raise DataError(f"{where} has no {field!r}; it must be {{'role': …, 'content': …}}")
    role = _text(f"{where}.role", item["role"])
    content = _text(f"{where}.content", item["content"])
    if not role:
        raise DataError(f"{where}.role is empty; write system, user or assistant")
    if role == "assistant" and not content:
        raise DataError(f"{where}.content is empty, so there is nothing to learn")
    return Message(role, content)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_described(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half of a surrogate pair at character {error.start + 1}; write the whole "
            "character"
        ) from error
    return value


def _described(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}" if value else "an empty string"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if len(value) else "an empty list"  # type: ignore[arg-type]
