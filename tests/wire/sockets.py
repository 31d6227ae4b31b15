"""Requests over plain sockets, which a client may drop whenever it likes."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
# What a connection to a server that was killed fails with.
BROKEN = (OSError, EOFError)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    content_type: str
    body: bytes = field(repr=False)

    def json(self) -> Any:
        return json.loads(self.body)


class Dropped(Exception):
    """The client closed the connection before the answer came, as it was told to."""


class Connection:
    """One connection that stays open from request to request."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(
        self, method: str, path: str, body: bytes = b"", content_type: str = JSON
    ) -> Answer:
        """One request and its answer. Raises OSError, EOFError: the server went away."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(_head(method, path, self._key, content_type, len(body), "keep-alive") + body)
        return await _answer(reader)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()


async def request(
    port: int,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    key: str,
    content_type: str = JSON,
    drop_after: float | None = None,
    slow: float = 0.0,
) -> Answer:
    """One request and its answer.

    Args:
        drop_after: seconds after sending, break the connection.
        slow: seconds that the body takes, sent in two pieces.

    Raises:
        Dropped: as asked for. OSError, EOFError: the server went away.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_head(method, path, key, content_type, len(body), "close"))
        half = len(body) // 2 if slow else 0
        writer.write(body[:half])
        if slow:
            await asyncio.sleep(slow)
        writer.write(body[half:])
        if drop_after is not None:
            await asyncio.sleep(drop_after)
            raise Dropped
        await writer.drain()
        return await _answer(reader)
    finally:
        writer.transport.abort()


def _head(
    method: str, path: str, key: str, content_type: str, length: int, connection: str
) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"X-API-Key: {key}",
        f"Connection: {connection}",
        f"Content-Type: {content_type}",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def _answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head[1:] if line)
    }
    body = await reader.readexactly(int(fields.get("content-length", "0")))
    return Answer(int(head[0].split()[1]), fields.get("content-type", ""), body)
