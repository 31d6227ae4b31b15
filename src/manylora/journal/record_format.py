"""The journal's records lie in files in this format, and are found in a damaged one, too.

A record is a frame: a fixed part with its own checksum (magic, the two lengths, the two checksums),
a header (JSON: what it is) and a body (bytes: what the client sent). So a damaged length is noticed
before it leads astray, and a damaged body still says whose it was.

The magic occurs nowhere else: where a body contains its first seven bytes, a zero is put behind
them. So a reader that looks for the next record after damage finds real ones only, never one that a
client hid in its data.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manylora.types.files import no_descriptor_left

# The first byte cannot begin a character of the header (ASCII) and does not come twice.
_MARK = b"\xf7mlJrec"
MAGIC = _MARK + b"\x01"
_ESCAPED = _MARK + b"\x00"
_FIXED = struct.Struct("<8s5I")
_LARGEST = 2**63 - 1
_LONGEST = 2**31 - 2**16  # what one call of the system reads
_CHUNK = 1 << 16

TORN = "the file ends inside a record"


@dataclass(frozen=True, slots=True)
class Record:
    """A record is one thing that was acknowledged.

    Attributes:
        stream: what it belongs to (an adapter, a sampler).
        seq: its number there.
        kind: what to do with it.
        tenant: whose it is.
        request_id, digest: together they tell a repeated request from another.
        body: what the client sent.
        meta: what else is known of it (JSON).
    """

    stream: str
    seq: int
    kind: str
    tenant: str
    request_id: str
    digest: str
    body: bytes
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """A `Found` is what lies at one place of a segment.

    Attributes:
        size: bytes up to the next place.
        record: None if nothing can be told. With a `reason`, or when bodies were not asked for,
            its body is empty.
        reason: what is wrong; "" = nothing.
    """

    offset: int
    size: int
    record: Record | None
    reason: str = ""


def encode(record: Record) -> bytes:
    """Return a record's frame. Raises ValueError or TypeError: a field's size or type is wrong."""
    if not (isinstance(record.seq, int) and isinstance(record.stream, str)):
        raise TypeError("a record's stream is a string, and its seq a number")
    if abs(record.seq) > _LARGEST:
        raise ValueError("the seq has more than 63 bits")
    about = [getattr(record, name) for name in _HEADER]
    header = json.dumps([*about, dict(record.meta)], separators=(",", ":")).encode("ascii")
    body = bytes(record.body).replace(_MARK, _ESCAPED)
    if max(len(header), len(body)) > _LONGEST:
        raise ValueError(f"{record.request_id}: too long for a journal")
    numbers = (len(header), len(body), zlib.crc32(header), zlib.crc32(body))
    checksum = zlib.crc32(_FIXED.pack(MAGIC, *numbers, 0))
    return b"".join((_FIXED.pack(MAGIC, *numbers, checksum), header, body))


def read_segment(path: Path, bodies: bool = True) -> Iterator[Found]:
    """Yield everything in a file, in order. Whatever the file contains, this does not raise; only
    where no descriptor is left to open it, OSError.

    It reads a record at a time. A file that ends inside a record gives a last place with the reason
    `TORN`; so does one that ends in nothing but zeros (it had grown, and the power failed). With
    `bodies` = False they are skipped (and then not checked either).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if no_descriptor_left(error):  # there is nothing wrong with it
            raise
        yield Found(0, 0, None, f"cannot be opened: {error.strerror}")
        return
    try:
        size = os.fstat(descriptor).st_size
        position = 0
        while position < size:
            found = _read_frame(descriptor, position, size, bodies)
            if found.reason:
                found = _up_to_next(descriptor, found, size)
            yield found
            position += found.size
    finally:
        os.close(descriptor)


_HEADER = ("stream", "seq", "kind", "tenant", "request_id", "digest")


def _read_frame(descriptor: int, offset: int, size: int, bodies: bool) -> Found:
    try:
        fixed = os.pread(descriptor, _FIXED.size, offset)
        if len(fixed) < _FIXED.size:
            torn = fixed.startswith(MAGIC) or MAGIC.startswith(fixed)
            return Found(offset, 0, None, TORN if torn else "not a record")
        magic, header_len, body_len, header_crc, body_crc, checksum = _FIXED.unpack(fixed)
        numbers = (header_len, body_len, header_crc, body_crc)
        if magic != MAGIC or checksum != zlib.crc32(_FIXED.pack(MAGIC, *numbers, 0)):
            return Found(offset, 0, None, "not a record")
        start = offset + _FIXED.size
        end = start + header_len + body_len
        if end > size:
            return Found(offset, 0, None, TORN)
        header = os.pread(descriptor, header_len, start)
        if zlib.crc32(header) != header_crc:
            return Found(offset, end - offset, None, "the header is damaged")
        *about, meta = json.loads(header)
        record = Record(**dict(zip(_HEADER, about, strict=True)), body=b"", meta=meta)
        if not bodies:
            return Found(offset, end - offset, record)
        body = os.pread(descriptor, body_len, start + header_len)
        if len(body) != body_len or zlib.crc32(body) != body_crc:
            return Found(offset, end - offset, record, "the body is damaged")
        whole = replace(record, body=body.replace(_ESCAPED, _MARK))
        return Found(offset, end - offset, whole)
    except OSError as error:
        return Found(offset, 0, None, f"cannot be read: {error.strerror}")
    except (ValueError, TypeError) as error:  # written by something else that knows the checksums
        return Found(offset, 0, None, f"the header makes no sense: {error}")


def _up_to_next(descriptor: int, found: Found, size: int) -> Found:
    """Return `found`, reaching to where the next record may begin.

    If the fixed part said where that is, and a record or the end is there, what lies between is
    not looked at: a flipped bit may have made a magic of a body's bytes.
    """
    if found.size and _begins_record(descriptor, found.offset + found.size, size):
        return found
    end = _find_magic(descriptor, found.offset + 1, size)
    reason = found.reason
    if end is None:
        if reason != TORN and _only_zeros(descriptor, found.offset, size):
            reason = TORN
    elif reason == TORN:
        reason = "a record that is not complete"
    return Found(found.offset, (end or size) - found.offset, found.record, reason)


def _begins_record(descriptor: int, offset: int, size: int) -> bool:
    try:
        return offset == size or os.pread(descriptor, len(MAGIC), offset) == MAGIC
    except OSError:
        return False


def _find_magic(descriptor: int, start: int, size: int) -> int | None:
    while start < size:
        try:
            chunk = os.pread(descriptor, _CHUNK + len(MAGIC) - 1, start)
        except OSError:  # a sector that cannot be read
            start += _CHUNK
            continue
        at = chunk.find(MAGIC)
        if at >= 0:
            return start + at
        start += _CHUNK
    return None


def _only_zeros(descriptor: int, start: int, size: int) -> bool:
    try:
        return all(
            not os.pread(descriptor, _CHUNK, at).strip(b"\0") for at in range(start, size, _CHUNK)
        )
    except OSError:
        return False
