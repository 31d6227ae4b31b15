"""One connection between a control process and a process of its engine.

Both ends prove that they know the group's secret before either reads a message of the other:

    control → member   32 random bytes
    member → control   32 random bytes, HMAC(secret, "member" + control's bytes)
    control → member   HMAC(secret, "control" + member's bytes)

A message is a prefix (length of the head, length of the payload), the head and the payload.
"""

import hmac
import secrets
import socket
import struct
from contextlib import suppress
from typing import Any

from manylora.processes.message import Encoded, decode

SECRET_BYTES = 32
_PREFIX = struct.Struct("<QQ")
_DIGEST = "sha256"
_DIGEST_BYTES = 32
# A head describes arrays and holds small values; far more than any request needs.
MOST_HEAD_BYTES = 1 << 30


class Connection:
    """A socket that carries messages. One thread may send while another receives."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def accepted(cls, sock: socket.socket, secret: bytes, seconds: float) -> "Connection":
        """Control's end of a connection.

        Raises:
            OSError: the other end does not know the secret, or took too long.
        """
        sock.settimeout(seconds)
        self = cls(sock)
        ours = secrets.token_bytes(SECRET_BYTES)
        sock.sendall(ours)
        theirs, proof = self._exactly(SECRET_BYTES), self._exactly(_DIGEST_BYTES)
        if not hmac.compare_digest(proof, hmac.digest(secret, b"member" + ours, _DIGEST)):
            raise ConnectionRefusedError("a connection without the group's secret")
        sock.sendall(hmac.digest(secret, b"control" + theirs, _DIGEST))
        sock.settimeout(None)
        return self

    @classmethod
    def made(cls, address: str, secret: bytes, seconds: float) -> "Connection":
        """A member's end.

        Args:
            address: `unix:PATH` or `HOST:PORT`.

        Raises:
            OSError: nobody is there, or somebody else.
        """
        kind, _, path = address.partition(":")
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(seconds)
            sock.connect(path)
        else:
            host, _, port = address.rpartition(":")
            sock = socket.create_connection((host.strip("[]"), int(port)), seconds)
        self = cls(sock)
        theirs, ours = self._exactly(SECRET_BYTES), secrets.token_bytes(SECRET_BYTES)
        sock.sendall(ours + hmac.digest(secret, b"member" + theirs, _DIGEST))
        expected = hmac.digest(secret, b"control" + ours, _DIGEST)
        if not hmac.compare_digest(self._exactly(_DIGEST_BYTES), expected):
            raise ConnectionRefusedError(f"{address} does not know the group's secret")
        sock.settimeout(None)
        return self

    def send(self, value: Any) -> None:
        """Raises OSError: the other end is gone."""
        self.send_frame(laid_out(value))

    def send_frame(self, message: "Frame") -> None:
        """Send what `laid_out` gave, perhaps to several connections."""
        for part in message:
            if part:
                self._socket.sendall(part)

    def receive(self, seconds: float | None = None) -> Any:
        """The next message.

        Args:
            seconds: how long its end may take to answer; None = for ever.

        Raises:
            EOFError: the other end is gone. OSError: the connection broke, or it took too long.
            ValueError: not ours.
        """
        self._socket.settimeout(seconds)
        head_size, payload_size = _PREFIX.unpack(self._exactly(_PREFIX.size))
        if head_size > MOST_HEAD_BYTES:
            raise ValueError(f"a head of {head_size} bytes")
        head = self._exactly(head_size)
        return decode(head, self._exactly(payload_size))

    def close(self) -> None:
        """Wake whoever receives, and free the socket."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view, filled = memoryview(buffer), 0
        while filled < size:
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise EOFError("the other end is gone")
            filled += count
        return buffer


Frame = tuple[bytes, bytearray]


def laid_out(value: Any) -> Frame:
    """A message that can be sent any number of times."""
    message = Encoded(value)
    payload = bytearray(message.size)
    message.write(payload)
    return _PREFIX.pack(len(message.head), len(payload)) + message.head, payload
