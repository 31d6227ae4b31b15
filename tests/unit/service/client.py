"""A client that calls the application without a socket."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
from fastapi import FastAPI

from manylora.service.contract import PROTOBUF_TYPE, Hub
from manylora.service.http.app import build_app
from manylora.service.http.context import ContextSettings
from manylora.service.hub_proxy import HubProxy

KEYS = {"tml-alice": "alice", "tml-bob": "bob"}
QUICK = ContextSettings(poll_seconds=0.05, least_poll_seconds=0.05, whole_result=50)


class Keys:
    """Two tenants; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def lookup(self, key: str) -> str | None:
        self.asked += 1
        return KEYS.get(key)


def application(hub: Hub, settings: ContextSettings = QUICK, **given: Any) -> FastAPI:
    given.setdefault("authenticator", Keys())
    return build_app(HubProxy(hub), settings=settings, **given)


class Client:
    """One tenant's client."""

    def __init__(self, app: Any, key: str | None = "tml-alice", host: str = "127.0.0.1") -> None:
        self.app, self.host = app, host
        self.headers = {} if key is None else {"x-api-key": key}

    def call(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, **given: Any
    ) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=(self.host, 1))
            async with httpx.AsyncClient(
                transport=transport, base_url="http://server", trust_env=False
            ) as client:
                merged = {**self.headers, **(headers or {})}
                return await client.request(method, path, headers=merged, **given)

        return asyncio.run(ask())

    def get(self, path: str, **given: Any) -> httpx.Response:
        return self.call("GET", path, **given)

    def post(self, name: str, content: Any) -> httpx.Response:
        return self.call("POST", f"/api/v1/{name}", json=content)

    def forward_backward(self, body: bytes, **headers: str) -> httpx.Response:
        return self.call(
            "POST",
            "/api/v1/forward_backward",
            content=body,
            headers={"content-type": PROTOBUF_TYPE, **headers},
        )
