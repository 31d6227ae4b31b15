"""Messages between our own processes are values as bytes: JSON for the shape, arrays beside it.

A message can hold plain values, arrays, and the classes that are listed here; nothing in it is
executed. What is read back equals what was written, order and NaN included; a sequence that is
neither list nor tuple becomes a tuple.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from manylora import types
from manylora.lora.sites import Site
from manylora.processes.commands import About, Hello, Vectors
from manylora.types import ManyloraError, errors
from manylora.types.data import Array
from manylora.types.mesh_shape import MeshShape

# Arrays begin at multiples of this, so that they can be used where they lie.
ALIGNMENT = 64
_TAG, _CONTENT = "~", "="

_CLASSES: dict[str, type] = {
    one.__name__: one
    for one in (
        *(value for value in vars(types).values() if isinstance(value, type)),
        *(About, Hello, MeshShape, Site, Vectors),
    )
    if is_dataclass(one)
}
_FIELDS = {name: tuple(field.name for field in fields(one)) for name, one in _CLASSES.items()}


class EncodedMessage:
    """An `EncodedMessage` is a value as a message: its head, and the buffers behind it."""

    def __init__(self, value: Any):
        """Encode a value. Raises TypeError: something that a message cannot hold."""
        self.buffers: list[Array] = []
        self.size = 0
        self.head = json.dumps(self._node(value), separators=(",", ":")).encode()

    def write(self, payload: bytearray) -> None:
        """Lay the buffers into `payload`, which has `size` bytes."""
        start = 0
        for buffer in self.buffers:
            payload[start : start + buffer.nbytes] = buffer.reshape(-1).view(np.uint8).data
            start += _padded(buffer.nbytes)

    def _node(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.ndarray):
            return _tagged("array", [self._kept(value), value.dtype.str, value.shape])
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, list):
            return [self._node(item) for item in value]
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise TypeError(f"a message's mappings have strings as keys, not {list(value)}")
            return _tagged("map", {key: self._node(item) for key, item in value.items()})
        name = type(value).__name__
        if _CLASSES.get(name) is type(value):
            return _tagged(name, [self._node(getattr(value, field)) for field in _FIELDS[name]])
        if isinstance(value, ManyloraError):
            return _tagged("error", [name, str(value)])
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
            return _tagged("tuple", [self._node(item) for item in value])
        raise TypeError(f"a message cannot hold a {name}")

    def _kept(self, array: Array) -> int:
        """Put an array behind the head; return where it begins there. Empty ones take no room."""
        start = self.size
        if array.size:
            self.buffers.append(np.ascontiguousarray(array))
            self.size += _padded(array.nbytes)
        return start


def decode(head: bytes | bytearray, payload: bytearray) -> Any:
    """Return the value of a message, whose arrays are views of `payload`. Raises ValueError: bytes
    that no message has."""
    try:
        return _value(json.loads(head), payload)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a message: {error}") from error


def _value(node: Any, payload: bytearray) -> Any:
    if isinstance(node, list):
        return [_value(item, payload) for item in node]
    if not isinstance(node, dict):
        return node
    tag, content = node[_TAG], node[_CONTENT]
    if tag == "array":
        start, name, shape = content
        dtype = np.dtype(name)
        if dtype.kind not in "biuf":
            raise TypeError(f"arrays of {dtype}")
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return np.zeros(shape, dtype)
        return np.frombuffer(payload, dtype, count, start).reshape(shape)
    if tag == "tuple":
        return tuple(_value(item, payload) for item in content)
    if tag == "map":
        return {key: _value(item, payload) for key, item in content.items()}
    if tag == "error":
        name, text = content
        return getattr(errors, name, ManyloraError)(text)
    values = (_value(item, payload) for item in content)
    return _CLASSES[tag](**dict(zip(_FIELDS[tag], values, strict=True)))


def _tagged(tag: str, content: Any) -> dict[str, Any]:
    return {_TAG: tag, _CONTENT: content}


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
