"""The key in `X-API-Key` becomes the request's tenant, once, before anything is read.

A key is never logged and never kept: the memory of known keys holds their digests.
"""

import hashlib
import time
from collections.abc import Collection
from typing import Protocol

from anyio import to_thread
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.service.http.responses import error_response
from manylora.service.http_errors import Unauthenticated

KEY_PREFIX = "tml-"
DEV_TENANT = "dev"
MAX_KEY, MAX_REMEMBERED = 512, 10_000
# How long a revoked key is served, and a new key that was tried too early is unknown, at most.
REMEMBER_SECONDS, FORGET_SECONDS = 10.0, 1.0
# Whole paths that need no key, and beginnings of paths: what lies below carries its own proof.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/api/v1/healthz"})
OPEN_PREFIXES = ("/api/v1/external_weights/", "/api/v1/archives/")
# It needs no key from this machine itself; from others it does: figures name tenants.
LOCAL_PATH = "/metrics"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
# What a proxy says of the client that it speaks for.
_FORWARDED = frozenset(
    b"forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip via".split()
)


class Authenticator(Protocol):
    """An `Authenticator` looks keys up."""

    def lookup(self, key: str) -> str | None:
        """Return the tenant of a key, or None. Called in a thread."""
        ...


class DevAuthenticator:
    """Without any key on the server, every `tml-…` key is the development tenant's."""

    def lookup(self, key: str) -> str | None:
        return DEV_TENANT if key.startswith(KEY_PREFIX) else None


class Authentication:
    """`Authentication` is ASGI middleware: it sets `scope["state"]["tenant"]`, or answers 401."""

    def __init__(
        self, app: ASGIApp, *, authenticator: Authenticator, local_only: bool = False
    ) -> None:
        """Refuse, if `local_only`, every client that is not on this machine (the development
        tenant)."""
        self.app = app
        self.authenticator = authenticator
        self.local_only = local_only
        self._known: dict[bytes, tuple[str | None, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _needs_no_key(scope):
            await self.app(scope, receive, send)
            return
        try:
            scope["state"]["tenant"] = await self._tenant(scope)
        except Unauthenticated as error:
            await error_response(error, scope["state"]["request_id"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _tenant(self, scope: Scope) -> str:
        if self.local_only and not is_near(scope):
            raise Unauthenticated(
                "this server has no keys yet and serves its own machine only; "
                "create one with `manylora keys create`"
            )
        keys = header_values(scope["headers"], b"x-api-key")
        if len(keys) != 1:
            raise Unauthenticated("send one key in the header X-API-Key")
        raw = keys[0]
        if len(raw) > MAX_KEY or not raw.isascii():
            raise Unauthenticated("the key is unknown")
        tenant = await self._lookup(raw)
        if tenant is None:
            raise Unauthenticated("the key is unknown")
        return tenant

    async def _lookup(self, raw: bytes) -> str | None:
        digest, now = hashlib.sha256(raw).digest(), time.monotonic()
        known = self._known.get(digest)
        if known is not None and now < known[1]:
            return known[0]
        tenant = await to_thread.run_sync(self.authenticator.lookup, raw.decode("ascii"))
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        seconds = FORGET_SECONDS if tenant is None else REMEMBER_SECONDS
        self._known[digest] = (tenant, now + seconds)
        return tenant


def _needs_no_key(scope: Scope) -> bool:
    path = scope["path"]
    if path == LOCAL_PATH:
        return is_near(scope)
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def is_near(scope: Scope) -> bool:
    """Return whether the client is on this machine, and no proxy that speaks for another."""
    client = scope.get("client")
    if client is not None and client[0] not in LOOPBACK:
        return False
    return not any(name in _FORWARDED for name, _ in scope["headers"])


def header_values(headers: Collection[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """Return every value of a header; ASGI gives names in lower case."""
    return [value for key, value in headers if key == name]
