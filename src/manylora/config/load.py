"""A run file is read, and each error says what is wrong, where, and what would be right."""

import difflib
import sys
import typing
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from manylora.config.overrides import apply_override
from manylora.config.run_file import (
    DATA_SUFFIXES,
    AdapterEntry,
    RunFile,
    is_data_file,
    is_name,
    is_template,
)
from manylora.config.server_file import ServerFile
from manylora.config.yaml_text import Document, KeyPath, problems_error, read_document
from manylora.types import ConfigError

Model = TypeVar("Model", bound=BaseModel)

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "model_type": "a mapping (key: value lines)",
    "model_attributes_type": "a mapping (key: value lines)",
    "dict_type": "a mapping (key: value lines)",
    "list_type": "a list",
    "tuple_type": "a list",
}
_LIMITS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", "≥"),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "≤"),
}
_ONE_LINE = 60


def load_run_file(path: str | PathLike[str], overrides: Sequence[str] = ()) -> RunFile:
    """Read, override and check a run file.

    Paths that are read (data, `init_from`, a base that begins with . or ~) are relative to the run
    file's folder and come back absolute, so that the run can be copied elsewhere; `out`, which is
    written, is relative to the current directory and comes back as it is. A `chat_template` comes
    back as the template itself, and every adapter has the one that it uses.

    Args:
        path: a YAML file.
        overrides: texts `a.b=c`, applied in order; see `manylora.config.overrides`.

    Raises:
        ConfigError: all problems found, one per line, each with file, line, key path and remedy.
    """
    file = Path(path)
    document = read_document(_read_text(file), str(path))
    hint = "a run file has at least base, out, and adapters with name and sft.train"
    run = _validate(RunFile, document, str(path), overrides, hint)
    return _with_templates(_with_absolute_paths(run, file.resolve().parent), file)


def load_server_file(path: str | PathLike[str] | None, overrides: Sequence[str] = ()) -> ServerFile:
    """Read, override and check a server file.

    Args:
        path: a YAML file; None = every setting comes from `overrides` and the defaults.
        overrides: texts `a.b=c`, applied in order; paths in them are relative to the current
            directory, those in the file to the file's folder.

    Raises:
        ConfigError: all problems found, one per line.
    """
    name = "the server's settings" if path is None else str(path)
    text = "{}" if path is None else _read_text(Path(path))
    server = _validate(ServerFile, read_document(text, name), name, overrides, "name its base")
    given = {override.partition("=")[0].strip().partition(".")[0] for override in overrides}

    def folder_of(setting: str) -> Path:
        return Path.cwd() if path is None or setting in given else Path(path).resolve().parent

    roots = [_below(folder_of("data_roots"), root) for root in server.data_roots]
    if path is None or "data_dir" in given:
        return server.model_copy(update={"data_roots": roots})
    data_dir = _below(folder_of("data_dir"), server.data_dir)
    return server.model_copy(update={"data_dir": data_dir, "data_roots": roots})


def _validate(
    model: type[Model], document: Document, name: str, overrides: Sequence[str], hint: str
) -> Model:
    for override in overrides:
        apply_override(document, override)
    if not isinstance(document.data, dict):
        found = "is empty" if document.data is None else "does not hold `key: value` lines"
        raise ConfigError(f"{name}: {found}; {hint}")
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        found = sorted(error.errors(include_url=False), key=lambda one: _line(one, document))
        problems = [_describe(details, document, model) for details in found]
        raise problems_error(name, problems) from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: there is no such file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{file}: is a folder; name the run file in it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def _with_absolute_paths(run: RunFile, folder: Path) -> RunFile:
    def source(text: str) -> str:
        if is_data_file(text):
            return str(_below(folder, text))
        if _below(folder, text).exists():
            raise ConfigError(
                f"{text}: there is such a folder or file beside the run file, and its name does "
                f"not end in {', '.join(DATA_SUFFIXES)}; rename it, or write ./ in front of a file"
            )
        return text

    def entry(adapter: AdapterEntry) -> AdapterEntry:
        start = adapter.lora.init_from
        lora = adapter.lora.model_copy(update={"init_from": start and _below(folder, start)})
        settings = adapter.kind_settings.with_sources(source)
        return adapter.model_copy(update={adapter.kind: settings, "lora": lora})

    base = str(_below(folder, run.base)) if run.base.startswith((".", "~", "/")) else run.base
    adapters = [entry(adapter) for adapter in run.adapters]
    return run.model_copy(update={"adapters": adapters, "base": base, "out": run.out.expanduser()})


def _with_templates(run: RunFile, file: Path) -> RunFile:
    def read(text: str | None, key: str) -> str | None:
        if text is None or is_template(text):
            return text
        found = _read_text(_below(file.resolve().parent, text))
        if not is_template(found):
            raise ConfigError(
                f"{file}: {key}: {text} holds no Jinja template (there is no {{{{ or {{% in it)"
            )
        return found

    whole = read(run.chat_template, "chat_template")

    def filled(entry: AdapterEntry) -> AdapterEntry:
        own = read(entry.chat_template, f"adapters.{entry.name}.chat_template")
        return entry.model_copy(update={"chat_template": own or whole})

    adapters = [filled(entry) for entry in run.adapters]
    return run.model_copy(update={"chat_template": None, "adapters": adapters})


def _below(folder: Path, path: str | Path) -> Path:
    return (folder / Path(path).expanduser()).resolve()


def _path(details: ErrorDetails) -> KeyPath:
    path: KeyPath = tuple(part for part in details["loc"] if part != "[key]")
    return (*path, *details.get("ctx", {}).get("within", ()))


def _line(details: ErrorDetails, document: Document) -> int:
    """Return the line in the file; what comes from `--set` comes last."""
    line = document.place(_path(details)).rpartition(":")[2]
    return int(line) if line.isdecimal() else sys.maxsize


def _describe(details: ErrorDetails, document: Document, root: type[BaseModel]) -> str:
    path = _path(details)
    return f"{document.place(path)}: {_spell(path, document.data)}: {_remedy(details, path, root)}"


def _spell(path: KeyPath, data: object) -> str:
    """Return a key path as `--set` takes it: `adapters.reverse.optimizer.lr`."""
    words: list[str] = []
    for part in path:
        word, inner = str(part), None
        if isinstance(data, dict):
            inner = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            names = [item.get("name") if isinstance(item, dict) else None for item in data]
            name = names[part]
            if is_name(name) and names.count(name) == 1:
                word = name
            inner = data[part]
        words.append(word)
        data = inner
    return ".".join(words)


def _remedy(details: ErrorDetails, path: KeyPath, root: type[BaseModel]) -> str:
    kind, context = details["type"], details.get("ctx", {})
    given = _shown(details["input"])
    if kind == "setting":
        return str(context["message"])
    if "betas" in path[-2:-1] + path[-1:] and kind in ("missing", "too_short", "too_long"):
        return "must list two numbers, such as [0.9, 0.999]"
    if kind == "missing":
        return f"is missing{_meaning(path, root)}"
    if kind == "extra_forbidden":
        return f"is not a setting here{_suggestion(path, root)}"
    if kind == "literal_error":
        return f"is {given}; choose {str(context['expected']).replace(chr(39), '')}"
    if kind in _LIMITS:
        name, sign = _LIMITS[kind]
        limit = context[name]
        return f"is {given}; it must be {sign} {limit if isinstance(limit, int) else f'{limit:g}'}"
    if kind == "too_short" and path[-1] == "adapters":
        return "is empty; list one adapter or more"
    if kind == "string_type" and isinstance(details["input"], bool | int | float):
        return f"is {given}, which YAML does not read as text; put it in quotes"
    if kind in _WANTED:
        return f"is {given}; it must be {_WANTED[kind]}"
    return f"is {given}; {details['msg']}"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _ONE_LINE else f"{text[:_ONE_LINE]}…"


def _meaning(path: KeyPath, root: type[BaseModel]) -> str:
    model = _model_at(path[:-1], root)
    field = model.model_fields.get(str(path[-1])) if model else None
    if field is None or not field.description:
        return ""
    return f"; it says: {' '.join(field.description.split()).rstrip('.')}"


def _suggestion(path: KeyPath, root: type[BaseModel]) -> str:
    model = _model_at(path[:-1], root)
    if model is None:
        return ""
    names = list(model.model_fields)
    elsewhere = _home(str(path[-1])) if model is AdapterEntry else None
    close = difflib.get_close_matches(str(path[-1]), names, n=1)
    if elsewhere or close:
        return f"; did you mean {elsewhere or close[0]}?"
    return f"; there are {', '.join(names)}"


def _home(name: str) -> str | None:
    """Return where in an adapter's sections a setting lives (`lr` is `optimizer.lr`)."""
    for section, field in AdapterEntry.model_fields.items():
        model = _model_of(field.annotation)
        if model is not None and name in model.model_fields:
            return f"{section}.{name}"
    return None


def _model_at(path: KeyPath, root: type[BaseModel]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = _model_of(field.annotation) if field else None
    return model


def _model_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _model_of(argument)
        if found is not None:
            return found
    return None
