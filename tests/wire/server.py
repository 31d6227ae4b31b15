"""A `manylora serve` in a process of its own, which a test may kill and start again."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from tests.threads import SESSION

BASE_ALIAS = "Qwen/Qwen3-8B-Base"
CHAT_ALIAS = "Qwen/Qwen3-4B-Instruct-2507"
DEVELOPER = "tml-test"  # any key will do where the server has none
# A start takes six seconds on a quiet machine; one that has failed is known at once.
START_SECONDS = 300.0
STOP_SECONDS = 60.0

_URL = re.compile(r"http://127\.0\.0\.1:(\d+)")
_KEY = re.compile(r"tml-[A-Za-z0-9_-]+")
_COMMAND = [sys.executable, "-m", "manylora.cli.main"]


def environment() -> dict[str, str]:
    """This process's, with its number of threads: bits are compared between servers."""
    return {**os.environ, "OMP_NUM_THREADS": str(SESSION), "PYTHONUNBUFFERED": "1"}


def run_keys(folder: Path, *words: str) -> str:
    """What `manylora keys …` prints."""
    done = subprocess.run(
        [*_COMMAND, "keys", *words, "--data-dir", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def create_key(folder: Path, tenant: str) -> str:
    """A new key of `tenant`."""
    printed = run_keys(folder, "create", tenant)
    found = _KEY.search(printed)
    assert found, printed
    return found.group()


class Process(Protocol):
    """What a server needs of its process."""

    pid: int
    stdout: Any

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def wait(self, timeout: float) -> int: ...


class Server:
    """One server over one data directory; `url` is known once it is ready."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = 0
        self.num_kills = 0
        self.log: list[str] = []
        self._process: Process | None = None
        self._readers: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Start and wait until it answers; a second start takes the same port."""
        found = self.launch()
        try:
            assert found.wait(START_SECONDS), self._complaint("printed no URL")
            end = time.monotonic() + START_SECONDS
            while not self.is_ready():
                assert time.monotonic() < end, self._complaint("is not ready")
                time.sleep(0.02)
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        return self

    def start_and_kill(self, seconds: float) -> None:
        """Start, and kill it after so long, however far it has come."""
        self.launch().wait(seconds)
        self.kill()

    def launch(self) -> threading.Event:
        """Start the process; the event tells when it printed its URL, or went."""
        aliases = [word for alias in (BASE_ALIAS, CHAT_ALIAS) for word in ("--alias", alias)]
        self._process = self._spawn(
            [
                *("serve", "--base", "seedling", *aliases),
                *("--port", str(self.port), "--data-dir", str(self.folder)),
                *self.options,
            ]
        )
        found = threading.Event()
        reader = threading.Thread(target=self._read, args=(self._process, found), daemon=True)
        reader.start()
        self._readers.append(reader)
        return found

    def _spawn(self, words: list[str]) -> Process:
        """A process that runs `manylora words…`."""
        return subprocess.Popen(
            [*_COMMAND, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )

    def is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._complaint("is gone")
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """As `kill -9` does."""
        self.num_kills += 1
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to stop; returns its exit status."""
        return self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Kill it and start it again over the same data and on the same port."""
        self.kill()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def _end(self, sign: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(sign)
        status = self._process.wait(STOP_SECONDS)
        for reader in self._readers:
            reader.join()
        self._readers.clear()
        self._process.stdout.close()
        return status

    def _read(self, process: Process, found: threading.Event) -> None:
        for line in process.stdout:
            self.log.append(line)
            match = _URL.search(line)
            if match and not found.is_set():
                self.port = int(match.group(1))
                found.set()
        found.set()  # it is gone; whoever waits will see that

    def _complaint(self, what: str) -> str:
        tail: Sequence[str] = self.log[-40:]
        return f"the server {what}:\n{''.join(tail)}"
