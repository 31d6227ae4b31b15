"""Each request gets one line of JSON, its id in the answer, and an answer to every error.

A line says who asked what and how it went; never a body, a key, a query or an id of an object.
"""

import json
import logging
import time
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.service.http.responses import error_response

ID_HEADER = b"x-request-id"
CLIENT_LEFT = 499

logger = logging.getLogger("manylora.access")


class AccessLog:
    """`AccessLog` is the outermost ASGI middleware: it sets `scope["state"]["request_id"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started = uuid4().hex, time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (ID_HEADER, request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception as error:
            response = error_response(error, request_id)
            if status:
                raise  # half an answer is out; only the server can break the connection
            await response(scope, receive, send_with_id)
        finally:
            self._write(scope, request_id, status or CLIENT_LEFT, time.perf_counter() - started)

    def _write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        line = {
            "request_id": request_id,
            "tenant": scope["state"].get("tenant"),
            "method": scope["method"],
            "route": route or "unknown",
            "status": status,
            "ms": round(seconds * 1000, 2),
        }
        # What a client can cause without a key, or has refused at will, is not written for ever.
        ordinary = line["tenant"] is not None and (status < 400 or status == 408)
        like = None if ordinary else (line["tenant"], line["route"], status)
        logger.info(json.dumps(line), extra={"like": like})
