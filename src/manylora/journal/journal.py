"""The journal keeps what was acknowledged since the last saved states, to be made again.

One log serves all streams, in segments `NNNNNNNN.log`. `append` gives a future; one thread writes
what has come and flushes it once for all waiters (group commit). A segment goes when nothing in
it is needed. Which records are covered is not written down: after a restart the owners of the
streams say it again (`covered`, `forget`), from their saved states.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from manylora.journal.needs import Needs
from manylora.journal.record_format import TORN, Record, encode, read_segment
from manylora.journal.recovery import recover, segments
from manylora.journal.segment_files import (
    cut,
    flush_data,
    lock_folder,
    make_folder,
    new_file,
    write_all,
)
from manylora.types import DataError, SaveFailed, TooManyFilesOpen

log = logging.getLogger("manylora.scheduler")

SEGMENT_BYTES = 64 << 20
MAX_RECORD_BYTES = 256 << 20
# What one flush may cover: more would only make the first in line wait longer.
_GROUP_BYTES = 8 << 20


@dataclass(slots=True)
class _Waiting:
    record: Record
    future: Future[None]
    frame: bytes = b""


class Journal:
    """A journal is a folder of segments that one process writes. It is thread-safe."""

    def __init__(
        self,
        folder: str | Path,
        segment_bytes: int = SEGMENT_BYTES,
        max_record_bytes: int = MAX_RECORD_BYTES,
        flush: Callable[[int], None] = flush_data,
    ):
        """Open the journal and take up what is in it; read it with `recover` before or after, but
        to the end before anything is covered.

        Args:
            segment_bytes: a segment that has so many is followed by a new one.
            max_record_bytes: of a body.
            flush: makes a descriptor's bytes durable.

        Raises:
            StoreError: another process has this journal open.
            SaveFailed: the folder cannot be written.
        """
        self.folder = Path(folder)
        self.segment_bytes = segment_bytes
        self.max_record_bytes = max_record_bytes
        self._flush = flush
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._needs = Needs()
        self._sizes: dict[int, int] = {}
        self._damaged: set[int] = set()
        # Descriptor and number of the segment that is written.
        self._active: tuple[int, int] | None = None
        try:
            make_folder(self.folder)
            self._lock = lock_folder(self.folder)
            try:
                self._take_up()
            except (OSError, TooManyFilesOpen):
                os.close(self._lock)
                raise
        except (OSError, TooManyFilesOpen) as error:
            raise SaveFailed(f"the journal {self.folder} cannot be written: {error}") from error
        self._last = max(self._sizes, default=0)
        self._thread = threading.Thread(target=self._loop, name="manylora-journal", daemon=True)
        self._thread.start()

    recover = staticmethod(recover)

    def append(self, record: Record) -> Future[None]:
        """Write a record, and return at once a future that is done when the record is durable. It
        fails with SaveFailed if it could not be written (a full disk); it is then as if it had
        never come. It cannot be cancelled. What is called back by it runs on the writing thread: be
        brief. Raises DataError: the body is longer than a record may be."""
        if len(record.body) > self.max_record_bytes:
            raise DataError(
                f"{record.request_id}: {len(record.body)} bytes; a request may have "
                f"{self.max_record_bytes}"
            )
        waiting = _Waiting(record, Future())
        waiting.future.set_running_or_notify_cancel()
        with self._changed:
            if self._closed:
                waiting.future.set_exception(SaveFailed(f"the journal {self.folder} is closed"))
            else:
                self._waiting.append(waiting)
                self._changed.notify()
        return waiting.future

    def note(self, record: Record) -> Future[None]:
        """Append what became of a record (it failed): needed as long as the record of that stream
        and number is, so nothing is written if that is covered already."""
        with self._changed:
            covered = self._needs.is_covered(record.stream, record.seq)
        if not covered:
            return self.append(record)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def covered(self, stream: str, seq: int) -> None:
        """Everything of that stream up to `seq` is in a saved state: it is no longer needed.

        Deletes segments, so it may take some milliseconds."""
        with self._freeing():
            self._needs.cover(stream, seq)

    def forget(self, stream: str) -> None:
        """The stream is over: nothing of it that was written so far is needed."""
        with self._freeing():
            self._needs.forget(stream)

    def streams(self) -> list[str]:
        """Return the streams of which something is needed."""
        with self._changed:
            return self._needs.streams()

    def lag(self) -> tuple[int, int]:
        """Return how many records are needed, and their bytes."""
        with self._changed:
            return self._needs.records, self._needs.bytes

    def lagging(self, limit_bytes: int) -> list[str]:
        """Return the streams to save first: those that need the oldest segments, so many of these
        that the journal has at most `limit_bytes` once they have gone."""
        streams: dict[str, None] = {}
        with self._changed:
            over = sum(self._sizes.values()) - limit_bytes
            for number in sorted(self._sizes):
                if over <= 0:
                    break
                streams |= dict.fromkeys(sorted(self._needs.streams_of(number)))
                over -= self._sizes[number]
        return list(streams)

    def close(self) -> None:
        """Write what waits, and let another process have the folder."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        with self._freeing():
            self._seal()
        os.close(self._lock)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # --- the writing thread ---------------------------------------------------------------------

    def _loop(self) -> None:
        while group := self._next_group():
            self._write([waiting for waiting in group if _encoded(waiting)])

    def _next_group(self) -> list[_Waiting]:
        """Wait for records; take what one flush shall cover: nothing once closed and drained."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            group: list[_Waiting] = []
            room = _GROUP_BYTES
            while self._waiting and (not group or len(self._waiting[0].record.body) <= room):
                group.append(self._waiting.popleft())
                room -= len(group[-1].record.body)
            return group

    def _write(self, group: Sequence[_Waiting]) -> None:
        if not group:
            return
        flushing = False
        try:
            descriptor, number = self._segment_with_room()
            write_all(descriptor, b"".join(waiting.frame for waiting in group))
            flushing = True
            self._flush(descriptor)
        except Exception as error:
            self._take_back(seal=flushing)
            log.error("%d records could not be journalled: %s", len(group), error)
            failure = f"the journal {self.folder} could not be written: {error}"
            for waiting in group:
                waiting.future.set_exception(SaveFailed(failure))
            return
        with self._changed:
            for waiting in group:
                record, size = waiting.record, len(waiting.frame)
                self._needs.add(number, record.stream, record.seq, size)
                self._sizes[number] += size
        for waiting in group:
            waiting.future.set_result(None)

    def _segment_with_room(self) -> tuple[int, int]:
        if self._active is not None and self._sizes[self._active[1]] < self.segment_bytes:
            return self._active
        with self._freeing():
            self._seal()
        self._last += 1
        active = new_file(self._path(self._last)), self._last
        with self._changed:
            self._active = active
            self._sizes[self._last] = 0
        return active

    def _take_back(self, seal: bool) -> None:
        """Take back what a failed write has left: nothing of the group may stay. With `seal` the
        flush failed: what the system holds of this file is no longer to be trusted, so nothing more
        goes into it."""
        if self._active is None:
            return
        descriptor, number = self._active
        try:
            os.ftruncate(descriptor, self._sizes[number])
            os.lseek(descriptor, self._sizes[number], os.SEEK_SET)
        except OSError:
            seal = True
        if seal:
            with self._freeing():
                self._seal()

    # --- segments -------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Learn what the segments contain, and cut off what was never acknowledged."""
        present = segments(self.folder)
        last = max(present, default=None)
        for number, path in present.items():
            size = path.stat().st_size
            for found in read_segment(path, bodies=False):
                if found.reason == TORN and number == last:
                    size = found.offset
                    cut(path, size)
                elif found.reason:
                    self._damaged.add(number)
                elif found.record is not None:
                    self._needs.add(number, found.record.stream, found.record.seq, found.size)
            self._sizes[number] = size

    def _seal(self) -> None:
        """Let nothing more into the active segment. The lock is held."""
        if self._active is not None:
            with suppress(OSError):
                os.close(self._active[0])
        self._active = None

    @contextmanager
    def _freeing(self) -> Iterator[None]:
        """Hold the lock for the body; then remove the segments in which nothing is needed."""
        with self._changed:
            yield
            active = None if self._active is None else self._active[1]
            free = [n for n in self._sizes if n != active and not self._needs.streams_of(n)]
            for number in free:
                del self._sizes[number]
        for number in free:
            path = self._path(number)
            try:
                if number in self._damaged:  # a person may want to look at it
                    path.rename(path.with_suffix(".damaged"))
                else:
                    path.unlink()
            except OSError as error:  # it comes back at the next start, and goes then
                log.warning("%s: not removed: %s", path, error)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.log"


def _encoded(waiting: _Waiting) -> bool:
    """Make the frame; a record that cannot be one fails alone."""
    try:
        waiting.frame = encode(waiting.record)
    except Exception as error:  # whatever it is, the others go on
        name = waiting.record.request_id
        waiting.future.set_exception(DataError(f"{name} cannot be journalled: {error}"))
        return False
    return True
