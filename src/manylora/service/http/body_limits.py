"""Limits bound a body's size, how slowly it may come, and how much may be on its way at once.
All is counted before it is held, whatever its header says.

Every route needs its whole body, so it is gathered here. One that is too large is answered with
413, and its first bytes go to a hook: a refused request may have a number that must be used up.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.service.http.auth import header_values
from manylora.service.http.capacity import Capacity, Held, neighbourhood
from manylora.service.http.responses import error_response
from manylora.service.http_errors import TooLarge, TooSlow, WrongEncoding
from manylora.types import ManyloraError

KIB, MIB = 1024, 1024**2
PREFIX_SECONDS = 5.0

# What is told of a refused body: the request's scope, the body's first bytes, and the refusal.
Refused = Callable[[Scope, bytes, TooLarge], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """`BodyLimits` are the bytes that a body may have, and the time that they may take.

    Attributes:
        ordinary: of every route that is not named.
        by_path: of the others.
        without_key: of a request without a key, or with an unknown one.
        prefix: how much of a refused body the hook gets.
        drained: how much of a refused body is read and thrown away before the connection is left
            to break.
        seconds: so long a body may take; a longer one must have `bytes_per_second` in every such
            span.
        arriving: bytes of all bodies that are held at once.
        arriving_each: of them, bytes of one tenant or address.
    """

    ordinary: int = 1 * MIB
    by_path: Mapping[str, int] = field(
        default_factory=lambda: {
            "/api/v1/forward_backward": 64 * MIB,
            "/api/v1/asample": 32 * MIB,
            "/api/v1/runs": 64 * MIB,
            "/api/v1/telemetry": 8 * MIB,
        }
    )
    without_key: int = 1 * KIB
    prefix: int = 4 * KIB
    drained: int = 1024 * MIB
    seconds: float = 30.0
    bytes_per_second: int = 16 * KIB
    arriving: int = 1024 * MIB
    arriving_each: int = 512 * MIB

    def of(self, path: str, tenant: str | None) -> int:
        """Return the limit of a path."""
        if tenant is None:
            return self.without_key
        return min(self.by_path.get(path, self.ordinary), self.arriving_each)


async def _ignore(scope: Scope, prefix: bytes, error: TooLarge) -> None:
    """Do nothing: this is no hook."""


class BodyLimit:
    """`BodyLimit` is ASGI middleware: it hands on a whole body, or answers 408, 413 or 429."""

    def __init__(self, app: ASGIApp, *, limits: BodyLimits, on_refused: Refused = _ignore) -> None:
        self.app = app
        self.limits = limits
        self.on_refused = on_refused
        self.room = Capacity(limits.arriving, limits.arriving_each, "bytes of requests in hand")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        tenant = scope["state"].get("tenant")
        limit = self.limits.of(scope["path"], tenant)
        with self.room.holding(*_owners(scope, tenant)) as held:
            coming = _Coming(receive, self.limits, held)
            try:
                _refuse_encoded(scope)
                # Only a tenant's number can be used up.
                prefix = 0 if tenant is None else self.limits.prefix
                body = await coming.whole(limit, _declared(scope), prefix)
            except ClientDisconnect:
                return
            except ManyloraError as error:
                if isinstance(error, TooLarge):
                    await self.on_refused(scope, coming.prefix, error)
                response = error_response(error, scope["state"]["request_id"])
                await response(scope, coming.rest, send)
                return
            await self.app(scope, _replay(body, receive), send)


class _Coming:
    """A `_Coming` is a body on its way; `prefix` are the first bytes of one that was too large."""

    def __init__(self, receive: Receive, limits: BodyLimits, held: Held):
        self._receive, self._limits, self._held = receive, limits, held
        self.prefix = b""
        self._body = bytearray()
        self._ended = False
        # What came since then.
        self._since = asyncio.get_running_loop().time()
        self._lately = 0

    async def whole(self, limit: int, declared: int, prefix: int) -> bytes:
        """Return all of it; of what says that it is too large, look at `prefix` bytes.

        Raises:
            TooLarge: it is, or says that it is; of what came, `prefix` is kept.
            TooSlow: it does not come on. Backpressure: there is no room for it.
            ClientDisconnect: its client left.
        """
        if declared <= limit:
            self._held.grow(declared)
            while not self._ended and len(self._body) <= limit:
                await self._next()
        else:
            await self._look(prefix)
        body, self._body = self._body, bytearray()
        if max(declared, len(body)) > limit:
            self.prefix = bytes(body[:prefix])
            self._held.shrink()
            raise TooLarge(f"the body is larger than this route's limit of {limit} bytes")
        return bytes(body)

    async def _look(self, num_bytes: int) -> None:
        """Wait for the first bytes, if they come soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(PREFIX_SECONDS, self._limits.seconds)):
                while not self._ended and len(self._body) < num_bytes:
                    await self._next()

    async def rest(self) -> Message:
        """Receive what is left of the body, for an answer that does not need it."""
        if self._ended:
            return {"type": "http.request", "body": b"", "more_body": False}
        return await self._receive()

    async def _next(self) -> None:
        loop, limits = asyncio.get_running_loop(), self._limits
        if self._lately >= limits.seconds * limits.bytes_per_second:
            self._since, self._lately = loop.time(), 0
        try:
            async with asyncio.timeout_at(self._since + limits.seconds):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow(
                f"the body did not come: {limits.seconds:g} seconds are what it may take, and "
                f"{limits.bytes_per_second:,} bytes a second what it must bring after that; "
                "send it again"
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        self._held.grow(len(self._body) + len(part))
        self._body += part
        self._lately += len(part)
        self._ended = not message.get("more_body", False)


def _owners(scope: Scope, tenant: str | None) -> tuple[str, ...]:
    client = scope.get("client")
    address = "this client" if client is None else f"address {neighbourhood(client[0])}"
    return (address,) if tenant is None else (address, f"tenant {tenant}")


def _refuse_encoded(scope: Scope) -> None:
    encodings = header_values(scope["headers"], b"content-encoding")
    if any(value.strip().lower() not in (b"", b"identity") for value in encodings):
        raise WrongEncoding("a compressed body is not supported; send it as it is")


def _declared(scope: Scope) -> int:
    values = header_values(scope["headers"], b"content-length")
    return int(values[0]) if len(values) == 1 and values[0].isdigit() else 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the gathered body at once, then what the server says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
