"""How large a body may be: counted as it comes, whatever its header says.

Every route needs its whole body, so it is gathered here. One that is too large is drained (a client
that is cut off while it sends sees a broken connection and tries again for minutes), answered with
413, and its first bytes go to a hook: a refused request may have a number that must be used up.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.service.auth import header_values
from manylora.service.errors import TooLarge, WrongEncoding
from manylora.service.responses import error_response

KIB, MIB = 1024, 1024**2

# What is told of a refused body: the request's scope, the body's first bytes, and the refusal.
Refused = Callable[[Scope, bytes, TooLarge], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """Bytes that a body may have.

    Attributes:
        ordinary: of every route that is not named.
        by_path: of the others.
        prefix: how much of a refused body the hook gets.
        drained: how much of a refused body is read and thrown away before the connection is left
            to break.
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
    prefix: int = 4 * KIB
    drained: int = 1024 * MIB

    def of(self, path: str) -> int:
        """The limit of a path."""
        return self.by_path.get(path, self.ordinary)


async def _ignore(scope: Scope, prefix: bytes, error: TooLarge) -> None:
    """No hook."""


class BodyLimit:
    """ASGI middleware: hands on a whole body, or answers 413."""

    def __init__(
        self, app: ASGIApp, *, limits: BodyLimits | None = None, on_refused: Refused = _ignore
    ) -> None:
        self.app = app
        self.limits = BodyLimits() if limits is None else limits
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope["state"]["request_id"]
        encodings = header_values(scope["headers"], b"content-encoding")
        if any(value.strip().lower() not in (b"", b"identity") for value in encodings):
            refusal = WrongEncoding("a compressed body is not supported; send it as it is")
            await error_response(refusal, request_id)(scope, receive, send)
            return
        limit = self.limits.of(scope["path"])
        parts, size, ended = await self._gather(receive, limit, _declared(scope))
        if not ended:
            return
        if size > limit:
            error = TooLarge(f"the body is larger than this route's limit of {limit} bytes")
            prefix = b"".join(parts)[: self.limits.prefix]
            await self.on_refused(scope, prefix, error)
            await error_response(error, request_id)(scope, receive, send)
            return
        await self.app(scope, _replay(b"".join(parts), receive), send)

    async def _gather(
        self, receive: Receive, limit: int, declared: int
    ) -> tuple[list[bytes], int, bool]:
        """What to keep of the body, its size, and whether the client stayed until its end.

        The size is at least what the header declares: a body that says it is too large is.
        """
        parts: list[bytes] = []
        kept = size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return parts, size, False
            part = message.get("body", b"")
            size += len(part)
            if max(size, declared) <= limit or kept < self.limits.prefix:
                parts.append(part)
                kept += len(part)
            if not message.get("more_body", False):
                return parts, max(size, declared), True
            if size > self.limits.drained:
                return parts, size, True


def _declared(scope: Scope) -> int:
    values = header_values(scope["headers"], b"content-length")
    return int(values[0]) if len(values) == 1 and values[0].isdigit() else 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the gathered body at once, then what the server says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
