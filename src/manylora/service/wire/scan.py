"""A protobuf body's outline is read without building it.

The parser makes an object of some hundred bytes from each part, and a part may be two bytes long;
so parts are counted before anything is parsed. And a body that was cut off by a limit still says in
its first bytes whose it was.
"""

from collections.abc import Iterator
from contextlib import suppress

from manylora.service.http_errors import TooLarge
from manylora.service.wire.paths import MAX_IDENTIFIER, order_place
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import DataError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# Field numbers of ForwardBackwardRequest and of Datum.
MODEL_ID, SEQ_ID, DATA = 1, 2, 3
CHUNKS, INPUTS = 1, 2


class _Torn(ValueError):
    """The bytes end in the middle of a field, or are no protobuf."""


def _varint(body: bytes, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 70:
        byte = body[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, place
        shift += 7
    raise _Torn


def _fields(body: bytes, place: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field's (number, wire type, start, end); the start of a VARINT is its value."""
    while place < end:
        tag, place = _varint(body, place, end)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            start, place = _varint(body, place, end)
            yield number, wire_type, start, place
            continue
        if wire_type == BYTES:
            size, place = _varint(body, place, end)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            raise _Torn
        if size > end - place:
            raise _Torn
        yield number, wire_type, place, place + size
        place += size


def peek_ids(prefix: bytes) -> tuple[str, int] | None:
    """Read the model and sequence number of a forward_backward from the start of its body; None if
    the start does not say."""
    model_id: str | None = None
    seq_id: int | None = None
    with suppress(_Torn, UnicodeDecodeError):
        for number, wire_type, start, end in _fields(prefix, 0, len(prefix)):
            if (number, wire_type) == (MODEL_ID, BYTES) and end - start <= MAX_IDENTIFIER:
                model_id = prefix[start:end].decode()
            elif (number, wire_type) == (SEQ_ID, VARINT):
                seq_id = start
            if model_id is not None and seq_id is not None:
                break
    return order_place(model_id, seq_id)


def check_outline(body: bytes, limits: WireLimits) -> None:
    """Refuse a forward_backward body with too many parts, before it is parsed. Raises TooLarge:
    more data or parts than the limits allow; DataError: no protobuf."""
    data = parts = 0
    try:
        for number, wire_type, start, end in _fields(body, 0, len(body)):
            parts += 1
            if number == DATA and wire_type == BYTES:
                data += 1
                parts += _datum_parts(body, start, end, data - 1, limits)
            if data > limits.data:
                raise TooLarge(f"more than {limits.data} data in one request")
            if parts > limits.parts:
                raise TooLarge(f"more than {limits.parts} parts in one request")
    except _Torn:
        raise DataError("the body is no protobuf, or is cut off") from None


def _datum_parts(body: bytes, start: int, end: int, index: int, limits: WireLimits) -> int:
    parts = inputs = 0
    for number, _, _, _ in _fields(body, start, end):
        parts += 1
        inputs += number == INPUTS
        if inputs > limits.inputs:
            raise TooLarge(f"data[{index}] has more than {limits.inputs} loss inputs")
        if parts > limits.parts:
            break
    return parts
