"""Results wait for their clients in one file each, readable until its time is over.

A result is written when it is there, and made durable later, by `flush`, for many at once: until
then the journal still has the operation, and would make it again. A file is its own description, so
a restart needs no list.
"""

import ctypes
import hashlib
import json
import logging
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from manylora.types import SaveFailed
from manylora.types.files import flush_path, tell_shortage_apart

log = logging.getLogger("manylora.service")

_HEAD = struct.Struct("<4sII")
_MAGIC = b"mlr1"
# What an entry costs in memory beside its body, roughly.
_ENTRY_BYTES = 700
# Up to so many files are flushed one by one; more by one call for the whole file system.
_FEW = 4


@dataclass(frozen=True, slots=True)
class Result:
    """A `Result` is what an operation gave, as it goes over the wire.

    Attributes:
        owner: the tenant who may read it.
        created_at: unix seconds.
    """

    request_id: str
    owner: str
    content_type: str
    body: bytes
    created_at: float


class Results:
    """`Results` are a folder of results, with the latest in memory too. Thread-safe; all but
    `recent` read or write files, so they belong on a worker thread."""

    def __init__(
        self,
        folder: str | Path,
        ttl_seconds: float,
        memory_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.time,
    ):
        """Make the folder if it is missing, and remove what a killed process left half-written. A
        result can be read for `ttl_seconds`; of the latest, `memory_bytes` are kept in memory.
        Raises SaveFailed: the folder cannot be made."""
        self.folder = Path(folder)
        self.ttl_seconds = ttl_seconds
        self.memory_bytes = memory_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._recent = _Recent(memory_bytes)
        # Results that no file has, because the disk was full.
        self._unwritten = _Recent(memory_bytes)
        self._flushing = threading.Lock()
        # None = so many that a list would not pay.
        self._unflushed: list[Path] | None = []
        self._number = count()
        self._partial = self.folder / "partial"
        try:
            for name in ("partial", *(f"{i:02x}" for i in range(256))):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            for path in self._partial.iterdir():  # a killed process left it
                path.unlink(missing_ok=True)
            flush_path(self.folder)
        except OSError as error:
            raise SaveFailed(f"the results' folder {folder} cannot be made: {error}") from error

    def put(self, request_id: str, owner: str, content_type: str, body: bytes) -> None:
        """Keep a result; it replaces an older one of that request. Raises SaveFailed: it could not
        be written. It can be read as long as memory has it, and `flush` tries again to write it."""
        result = Result(request_id, owner, content_type, bytes(body), self._clock())
        with self._lock:
            self._recent.put(result)
        self._write(result)

    def get(self, request_id: str) -> Result | None:
        """Return a result until its time is over, else None. Raises TooManyFilesOpen."""
        found = self.recent(request_id)
        if found is None:
            found = _read(self._path(request_id))
            if found is None or found.request_id != request_id or self._over(found.created_at):
                return None
            with self._lock:
                self._recent.put(found)
        return found

    def recent(self, request_id: str) -> Result | None:
        """Return what `get` does, if memory has it. Touches no file."""
        with self._lock:
            found = self._recent.get(request_id) or self._unwritten.get(request_id)
        return None if found is None or self._over(found.created_at) else found

    def is_written(self, request_id: str) -> bool:
        """Return whether a result is not kept in memory only."""
        with self._lock:
            return self._unwritten.get(request_id) is None

    def flush(self) -> None:
        """Make everything that was put so far durable. Raises SaveFailed: something is not. What
        can make it again must stay."""
        with self._flushing:
            with self._lock:
                unwritten = self._unwritten.all()
            for result in unwritten:
                if not self._over(result.created_at):
                    self._write(result)
            with self._lock:
                paths = self._unflushed
                self._unflushed = []
            try:
                self._flush_files(paths)
            except OSError as error:
                with self._lock:
                    self._unflushed = None
                raise SaveFailed(f"{self.folder} could not be flushed: {error}") from error

    def sweep(self, now: float | None = None) -> int:
        """Delete the results whose time is over; return how many files that were."""
        now = self._clock() if now is None else now
        with self._lock:
            for kept in (self._recent, self._unwritten):
                kept.drop(lambda result: result.created_at + self.ttl_seconds <= now)
        return sum(self._remove_if_over(path, now) for path in self._files())

    def _write(self, result: Result) -> None:
        partial = self._partial / str(next(self._number))
        path = self._path(result.request_id)
        try:
            partial.write_bytes(_encoded(result))
            os.utime(partial, (result.created_at, result.created_at))
            with self._lock:  # not while `sweep` finds the older one's time to be over
                partial.rename(path)
                self._unwritten.drop(lambda kept: kept.request_id == result.request_id)
                self._remember(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            with self._lock:
                self._unwritten.put(result)
            raise SaveFailed(f"{result.request_id}: the result was not saved: {error}") from error

    def _remember(self, path: Path) -> None:
        if self._unflushed is not None:
            self._unflushed.append(path)
            if len(self._unflushed) > _FEW:
                self._unflushed = None

    def _flush_files(self, paths: list[Path] | None) -> None:
        if paths is None:
            _flush_file_system(self.folder)
            return
        for path in paths:
            with suppress(FileNotFoundError):  # deleted since
                flush_path(path)
        for folder in {path.parent for path in paths}:
            flush_path(folder)

    def _remove_if_over(self, path: Path, now: float) -> bool:
        try:
            if path.stat().st_mtime + self.ttl_seconds > now:
                return False
            with self._lock:
                if path.stat().st_mtime + self.ttl_seconds > now:
                    return False
                path.unlink()
                return True
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("%s: not removed: %s", path, error)
            return False

    def _over(self, created_at: float) -> bool:
        return created_at + self.ttl_seconds <= self._clock()

    def _files(self) -> Iterator[Path]:
        for number in range(256):
            with suppress(OSError), os.scandir(self.folder / f"{number:02x}") as entries:
                for entry in entries:
                    yield Path(entry.path)

    def _path(self, request_id: str) -> Path:
        name = hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / name


class _Recent:
    """`_Recent` holds the results that were used last, as many as fit. Not thread-safe."""

    def __init__(self, room: int):
        self._room = room
        self._results: OrderedDict[str, Result] = OrderedDict()

    def put(self, result: Result) -> None:
        self._drop_one(result.request_id)
        self._results[result.request_id] = result
        self._room -= _cost(result)
        while self._room < 0:
            self._drop_one(next(iter(self._results)))

    def get(self, request_id: str) -> Result | None:
        if request_id in self._results:
            self._results.move_to_end(request_id)
        return self._results.get(request_id)

    def all(self) -> list[Result]:
        return list(self._results.values())

    def drop(self, unwanted: Callable[[Result], bool]) -> None:
        for result in self.all():
            if unwanted(result):
                self._drop_one(result.request_id)

    def _drop_one(self, request_id: str) -> None:
        result = self._results.pop(request_id, None)
        if result is not None:
            self._room += _cost(result)


def _cost(result: Result) -> int:
    return len(result.body) + _ENTRY_BYTES


def _encoded(result: Result) -> bytes:
    about = [result.request_id, result.owner, result.content_type, result.created_at]
    header = json.dumps(about).encode("ascii")
    checksum = zlib.crc32(result.body, zlib.crc32(header))
    return b"".join((_HEAD.pack(_MAGIC, len(header), checksum), header, result.body))


def _read(path: Path) -> Result | None:
    """Read a result; None if there is none, or it is damaged. Raises TooManyFilesOpen: it may well
    be there."""
    try:
        with path.open("rb") as file:
            magic, length, checksum = _HEAD.unpack(file.read(_HEAD.size))
            if magic != _MAGIC:
                raise ValueError("not a result")
            header, content = file.read(length), file.read()
        if zlib.crc32(content, zlib.crc32(header)) != checksum:
            raise ValueError("its checksum is wrong")
        request_id, owner, content_type, created_at = json.loads(header)
        return Result(request_id, owner, content_type, content, created_at)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, struct.error) as error:
        tell_shortage_apart(error, path.name)
        log.warning("%s: a result that cannot be read: %s", path, error)
        return None


def _flush_file_system(folder: Path) -> None:
    """Flush once for thousands of small files, where flushing each would take minutes."""
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (AttributeError, OSError):  # not Linux
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)
