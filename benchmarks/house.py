"""This script counts in the source tree how many files a thing touches and a request passes.

    python -m benchmarks.house [--root FOLDER] [--static]

Static counts are of the tree at FOLDER (this one if not given), so that two commits can be
compared; the ways of a request are measured on the package that is installed: a `forward_backward`
from an adapter's handle, and one as bytes to the service's application, until the engine is asked.
A file counts for a way if one of its functions is entered, whichever thread that is in.
"""

import argparse
import ast
import asyncio
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

import manylora
from manylora.config import ServerFile
from manylora.engine import Engine
from manylora.service.http.app import build_app
from manylora.service.hub_proxy import HubProxy
from manylora.service.server import Service
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import Store
from manylora.types import Opening
from tests.unit.service import bodies
from tests.unit.service.client import Keys

HERE = Path(__file__).resolve().parents[1]
# The engine's verbs, and the words that every layer between a client and the engine has.
VERBS = ("create", "restore", "drop", "forward_backward", "optim_step", "sample", "state")
WORDS = ("submit", "run", "call", "close")
# One of each kind of change, by the name under which it can be found: adding it touched every file
# that has the name.
CHANGES = {
    "an option of an opening": "activation_checkpointing",
    "a verb of the engine": "drop_snapshot",
    "a numbered route": "save_weights_external",
}


def sources(root: Path) -> dict[str, str]:
    """Return the text of every source file but generated ones, by its path in the package."""
    package = root / "src" / "manylora"
    return {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
        if not path.stem.endswith("_pb2")
    }


def definitions(texts: dict[str, str]) -> dict[str, list[str]]:
    """Return function and method names → the files that define one so named."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in texts.items():
        names = {
            node.name
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for name in names:
            found[name].append(path)
    return found


def twice(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return file stems and class names that stand twice or more."""
    stems: dict[str, int] = defaultdict(int)
    classes: dict[str, set[str]] = defaultdict(set)
    for path, text in texts.items():
        if not path.endswith("__init__.py"):
            stems[Path(path).stem] += 1
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                classes[node.name].add(path)
    return (
        sorted(stem for stem, count in stems.items() if count > 1),
        sorted(name for name, paths in classes.items() if len(paths) > 1),
    )


def static(root: Path) -> None:
    """Print what can be counted without running anything."""
    texts = sources(root)
    sizes = {path: text.count("\n") for path, text in texts.items()}
    stems, classes = twice(texts)
    print(f"{len(texts)} files, {sum(sizes.values()):,} lines, the longest {max(sizes.values())}")
    print(f"file names that stand twice: {len(stems)} {' '.join(stems)}")
    print(f"class names that stand twice: {len(classes)} {' '.join(classes)}")
    print(f"'# fmt: skip': {sum(text.count('# fmt: skip') for text in texts.values())}")
    print(f"'assert ... is not None': {_asserts(texts)}")
    defined = definitions(texts)
    for name in (*VERBS, *WORDS):
        print(f"files that define `{name}`: {len(defined[name])}")
    for kind, word in CHANGES.items():
        having = [path for path, text in texts.items() if word in text]
        print(f"files that {kind} touches (`{word}`): {len(having)} {' '.join(having)}")


def _asserts(texts: dict[str, str]) -> int:
    return sum(
        isinstance(node, ast.Assert) and "is not None" in ast.unparse(node.test)
        for text in texts.values()
        for node in ast.walk(ast.parse(text))
    )


# Where a request ends its way on one thread, and where on the other.
ENDS = {("scheduler/queue.py", "submit"), ("engine/engine.py", "forward_backward")}


class Way:
    """A `Way` records the files that are entered from its beginning until the engine is asked.

    Attributes:
        files: paths inside the package, in the order in which they are entered.
        hands: those among them that hand the request on: they have a frame on the stack when the
            queue takes it, or when the engine does.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.hands: dict[str, None] = {}
        self._package = f"{Path(manylora.__file__).parent}/"
        self._on = False
        # Also threads that are started from now on.
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def begin(self) -> None:
        """Count what is called from now on."""
        self._on = True

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if not self._on or event != "call" or not file.startswith(self._package):
            return
        path = file.removeprefix(self._package)
        # The words that all rooms share are no hop.
        if not path.startswith("types/"):
            self.files.setdefault(path)
        if (path, frame.f_code.co_name) in ENDS:
            self.hands.update(dict.fromkeys(reversed(list(self._stack(frame)))))
            self._on = path != "engine/engine.py"

    def _stack(self, frame: FrameType | None) -> Iterator[str]:
        while frame is not None:
            if frame.f_code.co_filename.startswith(self._package):
                yield frame.f_code.co_filename.removeprefix(self._package)
            frame = frame.f_back

    def end(self, name: str) -> None:
        """Print the files."""
        sys.setprofile(None)
        assert not self._on, "the engine was not asked"
        print(f"{name}: {len(self.files)} files are entered: {' '.join(self.files)}")
        print(f"{name}: {len(self.hands)} hand it on: {' '.join(self.hands)}")


def from_python() -> None:
    """Print the way of a `forward_backward` from an adapter's handle."""
    way = Way()
    with manylora.Trainer("seedling", threads=1) as trainer:
        adapter = trainer.create("a", rank=2)
        data = [manylora.causal_datum(list(range(8, 24)), [1.0] * 16)]
        way.begin()
        adapter.forward_backward(data).result()
        way.end("from an adapter's handle")


async def from_the_wire(folder: Path) -> None:
    """Print the way of a `forward_backward` from the application's first call."""
    settings = ServerFile(base="seedling", data_dir=folder, threads=1)
    way = Way()
    service = Service(settings, Store.in_folder(folder), WireLimits())
    hub = await service.start([Engine(Opening("seedling", threads=1))])
    proxy = HubProxy()
    proxy.arrive(hub)
    app = build_app(proxy, authenticator=Keys())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", trust_env=False
    ) as client:

        async def ask(route: str, **content: Any) -> dict[str, Any]:
            headers = {"x-api-key": "tml-alice"}
            answer = await client.post(f"/api/v1/{route}", headers=headers, **content)
            answer.raise_for_status()
            return answer.json() if "json" in answer.headers["content-type"] else {}

        session = (await ask("create_session", json={"tags": [], "sdk_version": "0"}))["session_id"]
        wanted = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "seedling",
            "lora_config": {"rank": 2},
        }
        made = await ask("create_model", json=wanted)
        await ask("retrieve_future", json={"request_id": made["request_id"]})
        request = bodies.request([bodies.plain_datum()], model_id=made["model_id"], seq_id=1)
        body = request.SerializeToString()
        way.begin()
        headers = {"x-api-key": "tml-alice", "content-type": "application/x-protobuf"}
        answer = await client.post("/api/v1/forward_backward", content=body, headers=headers)
        await ask("retrieve_future", json={"request_id": answer.json()["request_id"]})
        way.end("from the wire, the engine in the same process")
    await service.stop()


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=HERE, help="The tree to count in.")
    parser.add_argument("--static", action="store_true", help="Run nothing.")
    options = parser.parse_args()
    static(options.root)
    if not options.static:
        from_python()
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(from_the_wire(Path(folder)))


if __name__ == "__main__":
    main()
