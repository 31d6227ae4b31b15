"""Somebody's functions are loaded from files beside a run file, or from installed packages.

Each folder is a package of its own, with a name that nothing else has, and its files find each
other by `import helpers` as a script's would: two adapters may each have a `helpers.py`, and no
folder is left on sys.path. A file is executed once, however many of its functions are named, and
again only when it has changed.
"""

import ast
import builtins
import difflib
import hashlib
import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from manylora.types import ConfigError

_PREFIX = "manylora_code_"
_LINES = 6
_lock = threading.RLock()
# What each module of somebody's was made of.
_executed: dict[str, bytes] = {}


def load_symbol(name: str, key: str) -> Any:
    """Return what a run file names as `path/file.py:symbol` or `package.module:symbol`.

    Args:
        name: with an absolute path.
        key: of the run file, for messages.

    Raises:
        ConfigError: there is no such file, module or symbol, or loading it raised.
    """
    place, colon, symbol = name.rpartition(":")
    if not colon or not place or not symbol:
        raise ConfigError(
            f"{key}: {name!r} names no code; write module-file.py:symbol (a file beside the run "
            "file) or package.module:symbol"
        )
    file = code_file(name) if place.endswith(".py") else None
    try:
        module = importlib.import_module(place) if file is None else _load_file(file, key)
    except ModuleNotFoundError as error:
        if file is None and error.name and f"{place}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{key}: no module {error.name!r} is installed; a file beside the run file is "
                "named with .py"
            ) from error
        raise ConfigError(f"{key}: {place}: cannot be loaded:\n{last_lines(error)}") from error
    except (Exception, SystemExit) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {place}: cannot be loaded:\n{last_lines(error)}") from error
    return _symbol(module, place, symbol, key)


def code_file(name: str) -> Path | None:
    """Return the file that a name's code is in, executing nothing; None if there is none such."""
    place, colon, _ = name.rpartition(":")
    if not colon:
        return None
    if place.endswith(".py"):
        return Path(place)
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = place.split(".")
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    origin = None if spec is None else spec.origin
    return Path(origin) if origin and origin.endswith(".py") else None


def code_files(name: str) -> list[Path]:
    """Return the file of a name's code and those beside it that it imports, executing nothing."""
    first = code_file(name)
    if first is None:
        return []
    beside = name.rpartition(":")[0].endswith(".py")
    found, left = [first], [first] if beside else []
    while left:
        file = left.pop()
        for sibling in _imported(file, first.parent):
            if sibling not in found:
                found.append(sibling)
                left.append(sibling)
    return found


def _imported(file: Path, folder: Path) -> list[Path]:
    """Return the files of a folder that a file imports by name, wherever in it it does so."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # loading it will say so
    paths: list[Path] = []
    for node in ast.walk(tree):
        base, names = folder, [""]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder if not node.level else [file, *file.parents][node.level]
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)]
        for name in filter(None, names):
            path = base.joinpath(*name.split("."))
            paths += [path.with_name(f"{path.name}.py"), path / "__init__.py"]
            paths.append(base / name.partition(".")[0] / "__init__.py")
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def shown_name(name: str) -> str:
    """Return a name of code as messages have it: a file without its folder."""
    place, colon, symbol = name.rpartition(":")
    return f"{Path(place).name}:{symbol}" if colon and place.endswith(".py") else name


def last_lines(error: BaseException, lines: int = _LINES) -> str:
    """Return the end of an error's traceback, as much of it as a message has room for."""
    whole = traceback_text(error).rstrip().splitlines()
    return "\n".join(f"  {line[:300]}" for line in whole[-lines:])


def traceback_text(error: BaseException) -> str:
    """Return an error's traceback, without marks below its lines.

    To place those, Python parses the line, and two threads that parse at the same time break each
    other in Python 3.11 (SystemError: AST constructor recursion depth mismatch).
    """
    whole = traceback.TracebackException.from_exception(error)
    left: list[traceback.TracebackException | None] = [whole]
    while left:
        one = left.pop()
        if one is None:
            continue
        for frame in one.stack:
            frame.colno = frame.end_colno = None
        left += [one.__cause__, one.__context__, *(one.exceptions or ())]
    return "".join(whole.format())


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return the end of a message about a word that is not among those which are known."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(known)}" if known else "there is none"


def _symbol(module: ModuleType, place: str, symbol: str, key: str) -> Any:
    found: Any = module
    for part in symbol.split("."):
        if not hasattr(found, part):
            there = [
                name
                for name, value in vars(found).items()
                if not name.startswith("_") and callable(value)
            ]
            shown = Path(place).name if place.endswith(".py") else place
            raise ConfigError(f"{key}: {shown} has no {part!r}; {did_you_mean(part, there)}")
        found = getattr(found, part)
    return found


# -- a folder is a package --------------------------------------------------------------------


def _load_file(file: Path, key: str) -> ModuleType:
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "there is no such file"
        near = [path.name for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
        close = difflib.get_close_matches(file.name, near, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key}: {file}: {what}{hint}")
    with _lock:
        package = _package_of(file.parent.resolve())
        _forget_changed(package)
        name = f"{package}.{file.stem.replace('.', '_')}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(
            name, file, loader=_SiblingLoader(name, str(file))
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before = set(sys.modules)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            _forget([one for one in sys.modules if one not in before and _is_of(one, package)])
            raise
        return module


def _package_of(folder: Path) -> str:
    """Return the name of the package that a folder is here, and see to it that there is one."""
    name = _PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if not any(isinstance(finder, _SiblingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SiblingFinder())
    return name


def _forget_changed(package: str) -> None:
    """Have a folder's files executed anew if one of them is not what was executed."""
    for name, executed in _executed.items():
        module = sys.modules.get(name)
        if not _is_of(name, package) or module is None or module.__file__ is None:
            continue
        try:
            now = hashlib.sha256(Path(module.__file__).read_bytes()).digest()
        except OSError:
            now = b""
        if now != executed:
            _forget([one for one in sys.modules if _is_of(one, package)])
            return


def _is_of(name: str, package: str) -> bool:
    return name.startswith(f"{package}.")


def _forget(modules: Sequence[str]) -> None:
    for name in modules:
        sys.modules.pop(name, None)
        _executed.pop(name, None)


class _SiblingFinder:
    """A `_SiblingFinder` finds modules of somebody's folder, and no others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how a module is loaded, if it lies in such a folder."""
        if not name.startswith(_PREFIX) or path is None:
            return None
        # A file that was written a moment ago is not in what the finder remembers of the folder.
        importlib.invalidate_caches()
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _SiblingLoader(spec.loader.name, spec.loader.path)
        return spec


class _SiblingLoader(SourceFileLoader):
    """A `_SiblingLoader` executes a file so that it finds the others of its folder by their bare
    names, then and whenever one of its functions imports something later."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile the file as it is: a compiled one beside it may be of another minute."""
        data = self.get_data(self.path)
        _executed[fullname] = hashlib.sha256(data).digest()
        code: CodeType = compile(data, self.path, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: ModuleType) -> None:
        """Execute the file with an import of its own."""
        package = module.__name__.partition(".")[0]
        module.__dict__["__builtins__"] = {
            **vars(builtins),
            "__import__": _import_in(package, Path(sys.modules[package].__path__[0])),
        }
        super().exec_module(module)


def _import_in(package: str, folder: Path) -> Callable[..., ModuleType]:
    """Return an `__import__` that looks into a folder first, as a script's does."""

    def look_beside(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        first = name.partition(".")[0]
        beside = level == 0 and (
            (folder / f"{first}.py").is_file() or (folder / first / "__init__.py").is_file()
        )
        if not beside:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        with _lock:
            found = builtins.__import__(
                f"{package}.{name}", globals, locals, fromlist or ("__name__",), 0
            )
        return found if fromlist else sys.modules[f"{package}.{first}"]

    return look_beside
