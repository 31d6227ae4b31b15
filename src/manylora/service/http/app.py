"""The HTTP application consists of middleware, routes, and what an error looks like.

From the outside in: AccessLog (request id, one log line, no error without an answer), Leaving (a
refusal can be read), Outside (the host, the framing), Authentication (key → tenant), Admission (so
many requests of a tenant at once), BodyLimit (whole bodies of bounded size), then the routes.
"""

import secrets
from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

from manylora.service.http import (
    routes_checkpoints,
    routes_futures,
    routes_refused,
    routes_runs,
    routes_sampling,
    routes_sessions,
    routes_training,
)
from manylora.service.http.access_log import AccessLog
from manylora.service.http.auth import Authentication, Authenticator
from manylora.service.http.body_limits import BodyLimit
from manylora.service.http.capacity import Capacity
from manylora.service.http.concurrency import Admission
from manylora.service.http.connections import OpenConnections
from manylora.service.http.context import ContextSettings, RequestContext, body_schemas, straight
from manylora.service.http.early_answer import Leaving
from manylora.service.http.host_check import HostCheck, Names
from manylora.service.http.responses import answer_response, error_response
from manylora.service.http.signing import Signer
from manylora.service.http_errors import ErrorAnswer, Malformed, TooLarge
from manylora.service.hub_proxy import HubProxy
from manylora.service.wire.messages import KINDS, OptimStepRequest, RetrieveFutureRequest
from manylora.service.wire.reading import complaints
from manylora.service.wire.replies import ErrorReply
from manylora.types import ManyloraError

# A body of these that is too large uses its number up.
_KIND_AT = {f"{routes_training.router.prefix}/{name}": kind for name, kind in KINDS.items()}

_ROUTERS = (
    routes_sessions.health,
    routes_sessions.router,
    routes_training.router,
    routes_sampling.router,
    routes_futures.router,
    routes_checkpoints.router,
    routes_runs.router,
    routes_refused.router,
)

# The routes of every step, before those of the same paths that FastAPI documents.
_STRAIGHT = (
    straight("/api/v1/forward_backward", routes_training.forward_backward, None),
    straight("/api/v1/optim_step", routes_training.optim_step, OptimStepRequest),
    straight("/api/v1/retrieve_future", routes_futures.retrieve_future, RetrieveFutureRequest),
)


# What any route may answer besides its own.
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": words}
    for status, words in {
        400: "Refused; the message says why.",
        401: "No key, or an unknown one.",
        404: "No such thing of this tenant.",
        408: "The body did not come in time; send it again.",
        410: "The session is over, or the result is gone.",
        413: "The body, or something in it, is too large.",
        415: "Another content type or encoding is needed.",
        422: "The body does not have this route's form.",
        429: "No room now; try again soon.",
        503: "The server cannot store anything now.",
    }.items()
}


class _Application(FastAPI):
    """This FastAPI's document also describes the bodies that our own readers take."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            _, bodies = models_json_schema(
                [(model, "validation") for model in body_schemas()],
                ref_template="#/components/schemas/{model}",
            )
            components = document.setdefault("components", {})
            components["schemas"] = {**bodies["$defs"], **components.get("schemas", {})}
            key = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
            components["securitySchemes"] = {"key": key}
            no_scopes: list[str] = []
            document["security"] = [{"key": no_scopes}]
            self.openapi_schema = document
        return self.openapi_schema or {}


def build_app(
    hub: HubProxy,
    *,
    authenticator: Authenticator,
    local_only: bool = False,
    settings: ContextSettings | None = None,
    signing_secret: bytes | None = None,
    metrics: Callable[[], str] | None = None,
    names: Names | None = None,
    connections: OpenConnections | None = None,
) -> FastAPI:
    """Build the application around a hub.

    Args:
        local_only: answer only clients on this machine (with `DevAuthenticator`).
        signing_secret: of download addresses; None = a new one, so that old addresses end.
        metrics: the text of /metrics; called in a thread. None = no such route.
        names: hosts that are answered for; None = any.
        connections: told which of them are at work.
    """
    settings = ContextSettings() if settings is None else settings
    app = _Application(
        title="manylora",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_REFUSALS,
    )
    app.state.context = RequestContext(
        hub,
        settings,
        Signer(secrets.token_bytes(32) if signing_secret is None else signing_secret),
        CapacityLimiter(settings.readers),
        Capacity(settings.downloads, settings.downloads, "downloads in hand"),
    )
    app.router.routes += _STRAIGHT
    for router in _ROUTERS:
        app.include_router(router)
    if metrics is not None:
        _add_metrics(app, metrics)
    app.add_exception_handler(ManyloraError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    # The last one added is the outermost.
    bodies = settings.bodies
    app.add_middleware(BodyLimit, limits=bodies, on_refused=_number_used_up(app))
    app.add_middleware(Admission, most_each=settings.requests_each, connections=connections)
    app.add_middleware(Authentication, authenticator=authenticator, local_only=local_only)
    app.add_middleware(HostCheck, names=Names() if names is None else names)
    app.add_middleware(Leaving, most_bytes=bodies.drained, seconds=bodies.seconds)
    app.add_middleware(AccessLog)
    return app


def _number_used_up(app: FastAPI) -> Callable[[Scope, bytes, TooLarge], Any]:
    """Return BodyLimit's hook: it uses up the number of a request whose body was too large."""

    async def refused(scope: Scope, prefix: bytes, error: TooLarge) -> None:
        kind = _KIND_AT.get(scope["path"])
        ids = None if kind is None else kind.peek(prefix)
        if ids is not None:
            await app.state.context.refuse(scope["state"]["tenant"], *ids, error)

    return refused


def _add_metrics(app: FastAPI, metrics: Callable[[], str]) -> None:
    @app.get("/metrics", response_class=PlainTextResponse, tags=["health"])
    async def read_metrics() -> str:
        """Figures for Prometheus."""
        return await to_thread.run_sync(metrics)


# --- errors -----------------------------------------------------------------------------------


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.state.request_id)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Tell of a path or query that FastAPI itself found wrong as we tell of bodies."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    return error_response(Malformed(complaints(found)), request.state.request_id)


async def _on_http(request: Request, error: Exception) -> Response:
    """Answer that no such route is there, or not with this method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: "there is no such route", 405: "this route does not take that method"}
    answer = ErrorAnswer(status, words.get(status, "the request was refused"), "user")
    return answer_response(answer, request.state.request_id)
