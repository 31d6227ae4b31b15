"""The shape of the source tree: rooms and their manners, sizes, the tour, what may not be loaded.

Each check is a function from text to findings, so that a planted fault can show that it bites.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "src" / "manylora"
ARCHITECTURE = REPO / "docs" / "architecture.md"

# A file of one subject may be as long as that; most are far shorter.
FILE_LINES, FILE_LINES_STOP = 500, 600
FUNCTION_LINES, FUNCTION_LINES_STOP = 60, 100

# These two lists may only shrink. Each entry gives the size that it had when it was let in: it may
# not grow past that, and it must leave the list once it is within the ordinary limit.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}

# Rooms that have their place in the import contract before they have any code.
ROOMS_TO_COME: set[str] = set()
NO_ROOM_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
LIGHT_ROOMS = ["types", "config", "scheduler", "journal", "hosting", "store", "cli", "checkpoint"]
LIGHT_MODULES = ["lora.layout", "lora.sites", "lora.state"]
HEAVY_MODULES = ["torch", "transformers", "peft"]

PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPO / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def existing_rooms() -> list[Path]:
    """Every folder directly under the package that holds Python."""
    return [
        folder
        for folder in sorted(PACKAGE.iterdir())
        if folder.is_dir() and any(folder.rglob("*.py"))
    ]


def listed_rooms() -> set[str]:
    """The rooms that the import contract names, with or without parentheses."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in settings["contracts"] if c["id"] == "rooms")
    return {room.strip(" ()") for layer in layers for room in re.split(r"[|:]", layer)}


# --- rooms ------------------------------------------------------------------------------------


def missing_manners(init_source: str) -> list[str]:
    docstring = ast.get_docstring(ast.parse(init_source)) or ""
    return [words for words in ("Owns", "Does not own", "Talks to") if words not in docstring]


def test_every_room_says_what_it_owns_and_whom_it_talks_to():
    rooms = existing_rooms()
    assert rooms
    wanting = {}
    for room in rooms:
        init = room / "__init__.py"
        missing = missing_manners(init.read_text()) if init.exists() else ["__init__.py"]
        if missing:
            wanting[room.name] = missing
    assert wanting == {}


def test_a_room_without_manners_is_noticed():
    assert missing_manners('"""Owns tables. Talks to nobody."""') == ["Does not own"]
    assert missing_manners("owns = 1") == ["Owns", "Does not own", "Talks to"]


def test_the_rooms_are_those_that_the_import_contract_lists():
    """import-linter sees an unlisted room; an optional room that vanished it does not see."""
    assert {room.name for room in existing_rooms()} | ROOMS_TO_COME == listed_rooms()


def test_every_folder_of_code_is_a_package():
    """The import contract does not see code in a folder without an `__init__.py`."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert folders
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def exports_named_like_files(package: Path) -> set[str]:
    """Names that a package gives out and that its own files have, too: once such a file is
    imported, the name is the file. (It is imported already where the name comes out of it.)"""
    files = {path.stem for path in package.iterdir() if not path.name.startswith("_")}
    given: set[str] = set()
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name for alias in node.names}
            given |= names - {(node.module or "").rpartition(".")[2]}
    return given & files


def test_no_file_takes_the_name_of_what_its_package_gives_out(tmp_path: Path):
    for init in PACKAGE.rglob("__init__.py"):
        assert not exports_named_like_files(init.parent), init.parent
    (tmp_path / "__init__.py").write_text("from .start import run\nfrom .run import go\n")
    (tmp_path / "run.py").write_text("")
    assert exports_named_like_files(tmp_path) == {"run"}


def test_no_room_or_file_is_named_for_being_shared():
    names = [path.stem for path in PACKAGE.rglob("*.py")] + [room.name for room in existing_rooms()]
    assert names
    assert NO_ROOM_NAMES.intersection(names) == set()


@pytest.mark.parametrize("room", LIGHT_ROOMS + LIGHT_MODULES)
def test_light_rooms_import_without_torch(room: str):
    """The import contract covers what the room's modules name; this covers what really happens."""
    module = "manylora.cli.main" if room == "cli" else f"manylora.{room}"
    program = f"import sys, {module}; print(*(m for m in {HEAVY_MODULES} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# --- sizes ------------------------------------------------------------------------------------


def function_sizes(source: str) -> Iterator[tuple[str, int]]:
    """Qualified name and number of lines of every function, decorators included."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                yield prefix + child.name, (child.end_lineno or child.lineno) - first + 1
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(ast.parse(source), "")


def size_complaints(
    sizes: dict[str, int], allowed: dict[str, int], limit: int, stop: int
) -> list[str]:
    complaints = []
    for name, size in sizes.items():
        if size > stop:
            complaints.append(f"{name}: {size} lines; nothing may pass {stop}")
        elif size > max(limit, allowed.get(name, 0)):
            complaints.append(f"{name}: {size} lines; the limit is {allowed.get(name, limit)}")
    for name in allowed:
        if sizes.get(name, 0) <= limit:
            complaints.append(f"{name}: within {limit} lines or gone; take it off the list")
    return complaints


def test_files_stay_short():
    sizes = {
        relative(path): len(path.read_text().splitlines())
        for path in python_files("src", "tests", "benchmarks", "examples")
    }
    assert sizes
    assert size_complaints(sizes, LONG_FILES, FILE_LINES, FILE_LINES_STOP) == []


def test_functions_stay_short():
    sizes = {
        f"{relative(path)}::{name}": size
        for path in python_files("src", "tests", "benchmarks", "examples")
        for name, size in function_sizes(path.read_text())
    }
    assert sizes
    assert size_complaints(sizes, LONG_FUNCTIONS, FUNCTION_LINES, FUNCTION_LINES_STOP) == []


def test_sizes_are_counted_and_lists_only_shrink():
    source = "class A:\n    @staticmethod\n    def f():\n        x = 1\n        return x\n"
    assert list(function_sizes(source)) == [("A.f", 4)]
    assert size_complaints({"a": 60}, {}, 60, 100) == []
    assert size_complaints({"a": 61}, {}, 60, 100) == ["a: 61 lines; the limit is 60"]
    assert size_complaints({"a": 70}, {"a": 70}, 60, 100) == []
    assert size_complaints({"a": 71}, {"a": 70}, 60, 100) == ["a: 71 lines; the limit is 70"]
    assert len(size_complaints({"a": 101}, {"a": 101}, 60, 100)) == 1
    assert len(size_complaints({"a": 60}, {"a": 70}, 60, 100)) == 1
    assert len(size_complaints({}, {"gone": 70}, 60, 100)) == 1


# --- one name for one thing -------------------------------------------------------------------

# Files whose names follow a pattern may repeat one from elsewhere: a command's file has its name.
PATTERNS = ("cli/", "store/migrations/")
# A message's class is its name in the server's OpenAPI description, which stays.
TWO_CLASSES = {"Adapter"}


def repeated(places: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names among (name, place) that stand in two places or more."""
    found: dict[str, list[str]] = {}
    for name, place in places:
        found.setdefault(name, []).append(place)
    return {name: places for name, places in found.items() if len(set(places)) > 1}


def test_no_two_files_have_one_name():
    paths = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    stems = [
        (Path(path).stem, path)
        for path in paths
        if not path.startswith(PATTERNS) and not path.endswith("__init__.py")
    ]
    assert stems
    assert repeated(stems) == {}


def test_no_two_classes_have_one_name():
    classes = [
        (node.name, relative(path))
        for path in python_files("src")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert classes
    assert set(repeated(classes)) == TWO_CLASSES


def test_a_repeated_name_is_noticed():
    assert repeated([("a", "x"), ("b", "x"), ("a", "y")]) == {"a": ["x", "y"]}
    assert repeated([("a", "x"), ("a", "x")]) == {}


# --- the tour: every `file::symbol` of docs/architecture.md exists -----------------------------

REFERENCE = re.compile(r"`([\w./-]+\.py)::([\w.]+)(?:\(\))?`")


def defined_names(tree: ast.AST) -> dict[str, ast.AST]:
    """Functions, classes and assigned names directly in a module's or class's body."""
    names: dict[str, ast.AST] = {}
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update({t.id: node for t in targets if isinstance(t, ast.Name)})
    return names


def has_symbol(source: str, dotted: str) -> bool:
    node: ast.AST | None = ast.parse(source)
    for part in dotted.split("."):
        node = defined_names(node).get(part) if node else None
    return node is not None


def broken_references(text: str) -> list[str]:
    broken = []
    for path, symbol in REFERENCE.findall(text):
        found = [base / path for base in (REPO, PACKAGE) if (base / path).is_file()]
        if not found or not has_symbol(found[0].read_text(), symbol):
            broken.append(f"{path}::{symbol}")
    return broken


def test_the_tour_names_only_what_exists():
    assert ARCHITECTURE.is_file(), "docs/architecture.md is missing"
    text = ARCHITECTURE.read_text()
    assert REFERENCE.findall(text), "docs/architecture.md names no `file.py::symbol`"
    assert broken_references(text) == []


def test_a_broken_reference_is_noticed():
    here = "tests/unit/test_house.py"
    text = f"`{here}::has_symbol()` `{here}::REPO` `{here}::gone` `no/such.py::thing`"
    assert broken_references(text) == [f"{here}::gone", "no/such.py::thing"]
    assert has_symbol("class A:\n    def f(self): ...\n    x: int = 1\n", "A.f")
    assert not has_symbol("class A:\n    def f(self): ...\n", "A.g")


# --- nothing that is loaded may run code -------------------------------------------------------


_AUTO = re.compile(r"(.+\.)?Auto\w+\.from_pretrained")


def unsafe_loads(source: str) -> list[str]:
    """Uses of pickle in any guise, and of code that arrives with a model."""
    nodes = list(ast.walk(ast.parse(source)))
    torch_names = {"torch"}
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLING_MODULES]
            torch_names |= {a.asname for a in node.names if a.name == "torch" and a.asname}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            if module.split(".")[0] in PICKLING_MODULES:
                found.append(module)
            elif module in {"torch", "torch.serialization"}:
                found += [f"{module}.{a.name}" for a in node.names if a.name == "load"]
    loaders = {f"{name}{sub}.load" for name in torch_names for sub in ("", ".serialization")}
    for node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node) in loaders:
            found.append("torch.load")
        elif isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if off else [node.arg]
        elif isinstance(node, ast.Call) and _AUTO.fullmatch(ast.unparse(node.func)):
            # Left out, it asks on the terminal.
            said = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
            found += [] if said else [ast.unparse(node.func)]
    return found


def test_nothing_that_is_loaded_may_run_code():
    files = python_files("src")
    assert files
    unsafe = {relative(path): unsafe_loads(path.read_text()) for path in files}
    assert {path: found for path, found in unsafe.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill as d",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nload = t.load",
        "import torch\ntorch.serialization.load('x')",
        "f(trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder)",
        "transformers.AutoTokenizer.from_pretrained(folder, use_fast=True)",
        "f(trust_remote_code=flag)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_unsafe_loads_are_noticed(source: str):
    assert len(unsafe_loads(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["f(trust_remote_code=False)", "import json\njson.load(f)", "import numpy as np\nnp.load('x')"],
)
def test_safe_loads_pass(source: str):
    assert unsafe_loads(source) == []


# --- one way to round a share ------------------------------------------------------------------


def percent_formats(source: str) -> list[str]:
    """Format specifications that round a share their own way: `runs/board.py::percent` does it."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FormattedValue)]
    specs = [ast.unparse(node.format_spec).strip("f'\"") for node in nodes if node.format_spec]
    return [spec for spec in specs if spec.endswith("%")]


def test_shares_are_rounded_in_one_place():
    found = {relative(path): percent_formats(path.read_text()) for path in python_files("src")}
    assert {path: specs for path, specs in found.items() if specs} == {}


def test_another_rounding_is_noticed():
    assert len(percent_formats("print(f'{share:.0%} and {other:>5.1%} of {count:,}%')")) == 2
