"""An answer may come before the request has been read, and its client can still read it.

A socket that is closed with bytes in it takes back what was sent on it: a client that writes its
whole request first would see a broken connection instead of why it was refused. So the answer goes
out at once, the rest of the request is thrown away for a while, and then the connection ends.
"""

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.service.http.auth import header_values

_CLOSE = (b"connection", b"close")


class Leaving:
    """`Leaving` is ASGI middleware around everything that may answer early."""

    def __init__(self, app: ASGIApp, *, most_bytes: int, seconds: float) -> None:
        """Throw away up to `most_bytes`, for up to `seconds`, of a request that was answered."""
        self.app = app
        self.most_bytes, self.seconds = most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        body = _Body(receive)
        # A client that waits for a word before it sends its body does not send it after a refusal.
        waits = bool(header_values(scope["headers"], b"expect"))
        early = False

        async def answer(message: Message) -> None:
            nonlocal early
            if message["type"] == "http.response.start" and not body.ended:
                early = True
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if early and last and not body.ended:
                # All that the answer's length promises is out; the connection stays open.
                await send({**message, "more_body": True})
                if body.begun or not waits:
                    await body.drain(self.most_bytes, self.seconds)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self.app(scope, body.receive, answer)


class _Body:
    """A `_Body` is what a client sends; it knows whether that has begun, and was all."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.begun = self.ended = False

    async def receive(self) -> Message:
        self.begun = True
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.ended = True
        return message

    async def drain(self, most_bytes: int, seconds: float) -> None:
        """Throw away what comes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.ended and most_bytes > 0:
                    most_bytes -= len((await self.receive()).get("body", b""))


def _has_body(scope: Scope) -> bool:
    lengths = header_values(scope["headers"], b"content-length")
    chunked = header_values(scope["headers"], b"transfer-encoding")
    return bool(chunked) or any(value.strip() != b"0" for value in lengths)
