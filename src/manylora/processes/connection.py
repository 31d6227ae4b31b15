"""A connection joins a control process and a process of its engine.

Both ends prove that they know the group's secret before either reads a message of the other:

    control → member   32 random bytes
    member → control   32 random bytes, HMAC(secret, "member" + control's bytes)
    control → member   HMAC(secret, "control" + member's bytes)

A message is a prefix (length of the head, length of the payload), the head and the payload. In its
place, a member whose command takes too long, or that breaks down (a segmentation fault, an abort),
sends where each of its threads stands, and ends: that is faulthandler's own text, which knows no
prefix.
"""

import hmac
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from manylora.processes.message import EncodedMessage, decode

SECRET_BYTES = 32
_PREFIX = struct.Struct("<QQ")
_DIGEST = "sha256"
_DIGEST_BYTES = 32
# A head describes arrays and holds small values; far more than any request needs.
MOST_HEAD_BYTES = 1 << 30
# What faulthandler writes begins with one of these. As a length it would be 10¹⁸ bytes.
TOO_LONG, BROKEN = b"Timeout (", b"Fatal Python er"
# After one member has gone, for so long the others may say where they stood. After one has failed,
# for so long another may turn out to be gone, which would be why.
LAST_WORDS_SECONDS = 0.3
# A machine that is gone without a word is noticed after IDLE + COUNT · INTERVAL seconds.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
UNHEARD_MILLISECONDS = 30_000


class Unreachable(ConnectionError):
    """No process answers where the control process should be."""


class Ended(EOFError):
    """The other end took too long with a command, or broke down, and has ended.

    Attributes:
        stacks: where its threads stood.
    """

    def __init__(self, stacks: str):
        super().__init__("it broke down" if BROKEN.decode() in stacks else "it took too long")
        self.stacks = stacks


class Connection:
    """A connection is a socket that carries messages. A thread may send while another receives."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD_MILLISECONDS)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    @classmethod
    def accepted(cls, sock: socket.socket, secret: bytes, seconds: float) -> "Connection":
        """Return control's end of a connection. Raises OSError: the other end does not know the
        secret, or took too long."""
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
        """Return member's end of a connection.

        Args:
            address: `unix:PATH` or `HOST:PORT`.

        Raises:
            Unreachable: no process answers there.
            OSError, EOFError: another process does.
        """
        kind, _, path = address.partition(":")
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(seconds)
            sock.connect(path)
        else:
            host, _, port = address.rpartition(":")
            try:
                sock = socket.create_connection((host.strip("[]"), int(port)), seconds)
            except OSError as error:
                raise Unreachable(
                    f"{socket.gethostname()} cannot reach the control process at {address}: "
                    f"{error}; set engine_address to an address of the control process's machine "
                    "that the cluster's machines can reach, and let no firewall stand between"
                ) from error
        self = cls(sock)
        theirs, ours = self._exactly(SECRET_BYTES), secrets.token_bytes(SECRET_BYTES)
        sock.sendall(ours + hmac.digest(secret, b"member" + theirs, _DIGEST))
        expected = hmac.digest(secret, b"control" + ours, _DIGEST)
        if not hmac.compare_digest(self._exactly(_DIGEST_BYTES), expected):
            raise ConnectionRefusedError(f"{address} does not know the group's secret")
        sock.settimeout(None)
        return self

    def send(self, value: Any) -> None:
        """Send a value as a message. Raises OSError: the other end is gone."""
        self.send_frame(laid_out(value))

    def send_frame(self, message: "Frame") -> None:
        """Send what `laid_out` gave, perhaps to several connections."""
        for part in message:
            if part:
                self._socket.sendall(part)

    def receive(self, seconds: float | None = None) -> Any:
        """Wait for the next message, and return it.

        Args:
            seconds: how long its end may take to answer; None = for ever.

        Raises:
            EOFError: the other end is gone.
            OSError: the connection broke, or it took too long.
            ValueError: what came is no message of ours.
            Ended: the other end has ended, and says where it stood.
        """
        self._socket.settimeout(seconds)
        prefix = self._exactly(_PREFIX.size)
        if prefix.startswith((TOO_LONG, BROKEN)):
            raise Ended(self._rest(prefix).decode(errors="replace"))
        head_size, payload_size = _PREFIX.unpack(prefix)
        if head_size > MOST_HEAD_BYTES:
            raise ValueError(f"a head of {head_size} bytes")
        head = self._exactly(head_size)
        return decode(head, self._exactly(payload_size))

    def hang_up(self) -> None:
        """Let nothing more come or go; any thread.

        A thread that waits for a message is woken, and is then to close the socket: closing it here
        would not wake that thread.
        """
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket."""
        self.hang_up()
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

    def _rest(self, text: bytearray) -> bytearray:
        """Return `text` and all that comes behind it until the other end is gone."""
        self._socket.settimeout(1.0)
        with suppress(OSError):
            while more := self._socket.recv(1 << 16):
                text += more
        return text


Frame = tuple[bytes, bytearray]


def laid_out(value: Any) -> Frame:
    """Return a value as a message that can be sent any number of times."""
    message = EncodedMessage(value)
    payload = bytearray(message.size)
    message.write(payload)
    return _PREFIX.pack(len(message.head), len(payload)) + message.head, payload


def answers(
    connections: Sequence[Connection], last: Callable[[Any], bool], seconds: float = float("inf")
) -> dict[int, Any]:
    """Return the next message of each, by its place in `connections`, in the order of their coming.

    Args:
        last: whether a message ends the waiting, because others may wait for its sender for ever.
        seconds: how long all may take together.

    Raises:
        Ended: some have ended, and said where they stood.
        EOFError, OSError, ValueError: a connection's other end is gone, or it broke, or what came
            is no message of ours.
    """
    found: dict[int, Any] = {}
    stacks: dict[int, str] = {}
    loss: Exception | None = None
    enough = False
    # It needs no descriptor of its own: where none is left, no engine is lost for that.
    with selectors.PollSelector() as waiting:
        for number, connection in enumerate(connections):
            waiting.register(connection, selectors.EVENT_READ, number)
        end = time.monotonic() + seconds
        while waiting.get_map():
            rest = max(0.0, end - time.monotonic())
            ready = waiting.select(None if rest == float("inf") else rest)
            if not ready and enough and loss is None:
                return found
            if not ready:
                loss = loss or TimeoutError("timed out")
                break
            for key, _ in ready:
                waiting.unregister(key.fileobj)
                try:
                    found[key.data] = connections[key.data].receive()
                except (OSError, EOFError, ValueError) as error:
                    if isinstance(error, Ended):
                        stacks[key.data] = error.stacks
                    if loss is None:
                        loss, end = error, time.monotonic() + LAST_WORDS_SECONDS
                    continue
                if loss is None and not enough and last(found[key.data]):
                    enough, end = True, time.monotonic() + LAST_WORDS_SECONDS
    if stacks:
        texts = (f"process {number}:\n{text}" for number, text in sorted(stacks.items()))
        raise Ended("\n".join(texts))
    if loss is not None:
        raise loss
    return found
