"""YAML becomes plain data that remembers where each key stands.

PyYAML reads YAML 1.1, where `1e-3` is a string, `no` is false and `010` is eight. Run files are
read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), which people
expect, plus anchors and merge keys (`<<`), by which adapters share settings.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from manylora.types import ConfigError

KeyPath = tuple[str | int, ...]
MAX_DEPTH = 50

_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class CoreLoader(yaml.SafeLoader):
    """A `CoreLoader` loads safely and tells plain scalars apart as YAML 1.2 does."""

    # Its own, else the rules of YAML 1.1 would be inherited.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class CoreDumper(yaml.SafeDumper):
    """A `CoreDumper` quotes what `CoreLoader` or a YAML 1.1 reader would not take for a string."""


for _tag, _pattern, _first in _CORE_SCHEMA:
    for _reader_or_writer in (CoreLoader, CoreDumper):
        _reader_or_writer.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
        )


def _construct_int(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)


def _construct_float(loader: CoreLoader, node: yaml.ScalarNode) -> float:
    text = str(node.value).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


@dataclass(slots=True)
class Document:
    """A `Document` is plain data and, for each key path, where it was written (`run.yaml:7`)."""

    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Return where `path` was written, or the nearest enclosing key that was."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return ""


def read_document(text: str, file: str) -> Document:
    """Parse one YAML document. Raises ConfigError, with file and line, for bad syntax, a key
    written twice, or a key that is not text."""
    reader = _Reader(text, file)
    try:
        node = reader.loader.get_single_node()
        document = Document(None, {(): f"{file}:1"})
        if node is not None:
            document.data = reader.build(node, (), document.places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_at(file, mark)}: not valid YAML: {_explain(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: nested too deeply") from error
    finally:
        reader.loader.dispose()
    if reader.problems:
        raise problems_error(file, reader.problems)
    return document


def problems_error(file: str, problems: list[str]) -> ConfigError:
    """Return one error that lists every problem of a file."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    listed = "\n".join(f"  {problem}" for problem in problems)
    return ConfigError(f"{file} has {len(problems)} problems:\n{listed}")


def read_value(text: str) -> Any:
    """Parse a short piece of YAML such as `1e-3` or `[q_proj, v_proj]`."""
    return read_document(text, "value").data


class _Reader:
    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.problems: list[str] = []
        self.checked: set[int] = set()
        try:
            self.loader = CoreLoader(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise ConfigError(
                f"{file}:{line}: not valid YAML: the character U+{ord(text[error.position]):04X} "
                "is not allowed"
            ) from error

    def build(self, node: yaml.Node, path: KeyPath, places: dict[KeyPath, str]) -> Any:
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{_at(self.file, node.start_mark)}: nested too deeply")
        places.setdefault(path, _at(self.file, node.start_mark))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i), places) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, places)
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        # An explicit tag on something else (`!!bool maybe`), or an endless number.
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            text = str(node.value)[:40]
            raise ConfigError(
                f"{_at(self.file, node.start_mark)}: cannot read {text!r} as {node.tag}"
            ) from error

    def _mapping(
        self, node: yaml.MappingNode, path: KeyPath, places: dict[KeyPath, str]
    ) -> dict[str, Any]:
        self._refuse_repeated_keys(node, path)
        self.loader.flatten_mapping(node)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node)
            if not isinstance(key, str):
                self.problems.append(
                    f"{_at(self.file, key_node.start_mark)}: key {key_node.value!r} is not text; "
                    "put it in quotes"
                )
                continue
            here = (*path, key)
            # An own key comes after the merged one of the same name, and replaces it wholly.
            for stale in [known for known in places if known[: len(here)] == here]:
                del places[stale]
            places[here] = _at(self.file, key_node.start_mark)
            mapping[key] = self.build(value_node, here, places)
        return mapping

    def _refuse_repeated_keys(self, node: yaml.MappingNode, path: KeyPath) -> None:
        # An anchored mapping is met again at each alias, by then with merged keys beside its own.
        if id(node) in self.checked:
            return
        self.checked.add(id(node))
        first: dict[str, yaml.Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(
                    f"{_at(self.file, key_node.start_mark)}: a list or mapping cannot be a key"
                )
            key = str(key_node.value)
            if key in first and key_node.tag != "tag:yaml.org,2002:merge":
                self.problems.append(
                    f"{_at(self.file, key_node.start_mark)}: "
                    f"{'.'.join(map(str, (*path, key)))} is written twice (first on line "
                    f"{first[key].line + 1}); keep one"
                )
            first.setdefault(key, key_node.start_mark)


def _at(file: str, mark: yaml.Mark | None) -> str:
    return f"{file}:{mark.line + 1}" if mark is not None else file


def _explain(error: yaml.MarkedYAMLError) -> str:
    said = ", ".join(part for part in (error.context, error.problem) if part)
    column = error.problem_mark.column + 1 if error.problem_mark else None
    tab = "cannot start any token" in said and "\\t" in said
    remedy = "; indent with spaces, not tabs" if tab else ""
    return f"{said}{f' (column {column})' if column else ''}{remedy}"
