"""The server's end of TCP says who is let in, how long one may take, and when one must go.

uvicorn has no deadline for a request's head, none for a client that does not read, and no limit on
connections that send nothing. They are here, around its own protocol and its socket.
"""

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any
from uuid import uuid4

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from manylora.service.http.connections import Line, OpenConnections
from manylora.service.http.responses import RETRY_SECONDS
from manylora.service.http_errors import ErrorAnswer
from manylora.types import ConfigError

BACKLOG = 2048
# Connections that are accepted before others have a turn.
AT_ONCE = 32
# What a client may have sent on a connection that is refused, so that it can read why.
_GLANCE = 1 << 16
_NOBODY = (BlockingIOError, InterruptedError, ConnectionAbortedError)


class Listener(socket.socket):
    """A `Listener` is a socket that asyncio accepts from, with the limits of `connections`."""

    connections: OpenConnections
    _taken = 0
    _exhausted = False

    def listen(self, backlog: int = BACKLOG, /) -> None:
        """Listen; the queue of those that are not accepted yet is as long as it always was."""
        super().listen(BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection that may stay; any other is told so and closed. Raises
        BlockingIOError: no more in this turn of the loop; OSError: there is no descriptor left, and
        asyncio pauses for a second."""
        while self._taken < AT_ONCE and not self._exhausted:
            self._taken += 1
            try:
                sock, address = super().accept()
            except OSError as error:
                self._taken = 0
                if not isinstance(error, _NOBODY):
                    self._exhausted = True  # asyncio would ask a thousand times before it pauses
                    self.connections.close_longest()
                raise
            if self.connections.admit((address[0], address[1])):
                return sock, address
            _refuse(sock)
        self._taken, self._exhausted = 0, False
        raise BlockingIOError


def listen_at(host: str, port: int, connections: OpenConnections) -> Listener:
    """Return a socket that is bound and does not listen yet. Raises ConfigError: the address cannot
    be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only where it sees that it is TCP; otherwise every answer,
    # which is a head and a body, waits 40 ms for the client's word in between.
    listener = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.connections = connections
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error.strerror}; give another --port, or 0 for "
            "any free one"
        ) from error
    return listener


class Protocol(H11Protocol):
    """A `Protocol` is uvicorn's HTTP/1.1, with deadlines."""

    def __init__(
        self, *args: Any, connections: OpenConnections, head_seconds: float, write_seconds: float,
        **given: Any,
    ):  # fmt: skip
        """Keep these deadlines.

        Args:
            head_seconds: from the first byte of a request, or from the connection, to the head's
                end.
            write_seconds: a client that reads nothing for so long is gone.
        """
        super().__init__(*args, **given)
        self._table = connections
        self._head_seconds, self._write_seconds = head_seconds, write_seconds
        self._line: Line | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        assert self.client is not None
        self._line = self._table.opened(self.client, transport.abort)
        if self._line is None:
            transport.abort()
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_timer)
        _cancel(self._write_timer)
        if self._line is not None:
            self._table.closed(self._line)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        if self._line is not None:
            self._table.waits(self._line)
        if self.transport.get_write_buffer_size():
            _cancel(self._write_timer)
            self._write_timer = self.loop.call_later(self._write_seconds, self._still_unread)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancel(self._write_timer)
        self._write_timer = self.loop.call_later(self._write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._write_timer)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the form of every other refusal."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._say(ErrorAnswer(400, f"{msg} This server speaks HTTP/1.1.", "user"))
        else:  # half an answer is out
            self.transport.abort()

    def _still_unread(self) -> None:
        """Break off a closing connection, which waits for ever for its last bytes to be read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _watch_head(self) -> None:
        """Wait for the end of a head, but not for ever."""
        is_served = self.cycle is not None and not self.cycle.response_complete
        if is_served or self.transport.is_closing():
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0]:
            words = f"the request's head did not end within {self._head_seconds:g} seconds"
            self._say(ErrorAnswer(408, words, "user"))
        else:
            self.transport.close()

    def _say(self, answer: ErrorAnswer) -> None:
        if not self.transport.is_closing():
            self.transport.write(raw_answer(answer))
            self.transport.close()


def raw_answer(answer: ErrorAnswer) -> bytes:
    """Return a refusal where there is no application to make it."""
    told = {"error": answer.message, "category": answer.category, "request_id": uuid4().hex}
    body = json.dumps(told).encode()
    words = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
    lines = [
        f"HTTP/1.1 {answer.status} {words[answer.status]}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if answer.status == 503:
        lines.append(f"retry-after: {RETRY_SECONDS}")
    return "\r\n".join([*lines, "", ""]).encode() + body


_FULL = ErrorAnswer(503, "every connection of this server is in use; try again soon", "server")


def _refuse(sock: socket.socket) -> None:
    with sock, suppress(OSError):
        sock.setblocking(False)
        sock.send(raw_answer(_FULL))
        sock.shutdown(socket.SHUT_WR)
        sock.recv(_GLANCE)  # a socket that is closed with bytes in it takes the answer back


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
