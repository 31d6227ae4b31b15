"""Every route needs these: whose request it is, its body as a message, and the hub.

A body beyond `INLINE` bytes is read in a thread: the event loop never computes. A numbered request
that is refused here, before the hub saw it, uses its number up; later ones would wait for it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Route

from manylora.service.contract import JSON_TYPE, Hub
from manylora.service.http.body_limits import BodyLimits
from manylora.service.http.capacity import Capacity
from manylora.service.http.responses import json_response
from manylora.service.http.signing import Signer
from manylora.service.http_errors import WrongEncoding
from manylora.service.hub_proxy import HubProxy
from manylora.service.wire.messages import KIND_OF_MESSAGE
from manylora.service.wire.reading import read_json
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import ManyloraError

INLINE = 64 * 1024

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSettings:
    """`ContextSettings` say how requests are served.

    Attributes:
        bodies: limits on bytes.
        wire: limits on content.
        poll_seconds: how long retrieve_future holds a request whose result is not there. The SDK
            gives up after 45.
        least_poll_seconds: it never answers "not yet" sooner; the SDK asks again at once.
        whole_result: a larger result is announced first, if the client allows.
        url_seconds: how long a download address lives.
        readers: bodies that are read at the same time in threads.
        requests_each: requests of one tenant that are served at the same time.
        downloads: files that are sent at the same time; each is an open file.
    """

    bodies: BodyLimits = field(default_factory=BodyLimits)
    wire: WireLimits = field(default_factory=WireLimits)
    poll_seconds: float = 30.0
    least_poll_seconds: float = 1.0
    whole_result: int = 4 * 1024**2
    url_seconds: int = 3600
    readers: int = 4
    requests_each: int = 2048
    downloads: int = 32


@dataclass(frozen=True, slots=True)
class RequestContext:
    """A `RequestContext` is what routes share; `app.state.context`."""

    hub: HubProxy
    settings: ContextSettings
    signer: Signer
    readers: CapacityLimiter
    downloads: Capacity

    async def read(self, reader: Callable[[bytes], T], body: bytes) -> T:
        """Read a body: at once if it is small, else in a thread."""
        if len(body) <= INLINE:
            return reader(body)
        return await to_thread.run_sync(reader, body, limiter=self.readers)

    @asynccontextmanager
    async def using_up(
        self, tenant: str, ids: Callable[[], tuple[str, int] | None]
    ) -> AsyncIterator[None]:
        """Use up the number that `ids` finds for whatever is refused inside.

        The hub's own refusals are the hub's: do not call it inside.
        """
        try:
            yield
        except ManyloraError as error:
            found = ids()
            if found is not None:
                await self.refuse(tenant, *found, error)
            raise

    async def refuse(self, tenant: str, model_id: str, seq_id: int, error: ManyloraError) -> None:
        """Use up the number of a request that was refused; see `contract.TrainingApi`."""
        async with self.hub.entered() as hub:
            await hub.training.refuse(tenant, model_id, seq_id, error)


@dataclass(frozen=True, slots=True)
class Caller:
    """A `Caller` is who asks, and of which application."""

    context: RequestContext
    tenant: str
    request_id: str

    def hub(self) -> AbstractAsyncContextManager[Hub]:
        """Return the hub, once it is there. See `HubProxy.entered`."""
        return self.context.hub.entered()


# FastAPI runs a dependency that is no coroutine in a thread.
async def _find_context(request: Request) -> RequestContext:
    return request.app.state.context


async def _find_caller(request: Request) -> Caller:
    return Caller(request.app.state.context, request.state.tenant, request.state.request_id)


TheContext = Annotated[RequestContext, Depends(_find_context)]
TheCaller = Annotated[Caller, Depends(_find_caller)]

_schemas: dict[str, type[BaseModel]] = {}


def json_body(model: type[M]) -> Any:
    """Return the dependency that reads a route's JSON body as `model`."""
    return Depends(_json_reader(model))


def _json_reader(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    async def read(request: Request) -> M:
        caller, body = await _find_caller(request), await request.body()
        kind = KIND_OF_MESSAGE.get(model)
        ids = (lambda: None) if kind is None else partial(kind.peek, body)
        async with caller.context.using_up(caller.tenant, ids):
            check_type(request, JSON_TYPE)
            return await caller.context.read(partial(read_json, model), body)

    return read


def straight(
    path: str, handler: Callable[[Caller, Any], Awaitable[Any]], model: type[BaseModel] | None
) -> Route:
    """Make a route of FastAPI's again, without what FastAPI does around the handler. For those that
    every step of every client takes, that is more than what they do. The `handler` is the route's
    own, of a caller and of the message (`model`, its JSON body) or, without a model, the request.
    """
    read = None if model is None else _json_reader(model)

    async def answer(request: Request) -> Response:
        message = request if read is None else await read(request)
        reply = await handler(await _find_caller(request), message)
        return reply if isinstance(reply, Response) else json_response(reply)

    return Route(path, answer, methods=["POST"])


def check_type(request: Request, content_type: str) -> None:
    """Refuse a body of another content type. Raises WrongEncoding."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != content_type:
        raise WrongEncoding(f"this route takes a body of type {content_type}")


class Routes(APIRouter):
    """`Routes` leave out of their answers what is None."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **settings: Any) -> None:
        settings["response_model_exclude_none"] = True
        super().add_api_route(path, endpoint, **settings)


# --- what OpenAPI says of bodies that FastAPI does not read itself ------------------------------


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """Return `openapi_extra` of a route whose JSON body is `model`."""
    _schemas[model.__name__] = model
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": schema}}}}


def body_schemas() -> list[type[BaseModel]]:
    """Return every message that a route takes."""
    return list(_schemas.values())
