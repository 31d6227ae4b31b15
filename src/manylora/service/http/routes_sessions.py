"""These are the routes of sessions, of the SDK's switches, and of the server's health."""

from typing import Annotated

from starlette.responses import Response

from manylora.service.http.context import Routes, TheCaller, TheContext, json_body, takes
from manylora.service.http.responses import json_response
from manylora.service.wire.messages import (
    ClientConfigRequest,
    CreateSessionRequest,
    FinishSessionRequest,
    SessionRequest,
    TelemetryRequest,
)
from manylora.service.wire.paths import identifier
from manylora.service.wire.replies import (
    ClientConfig,
    CreateSessionReply,
    DynamicConfig,
    Empty,
    Health,
    HeartbeatReply,
    ServerCapabilities,
    TelemetryReply,
)

router = Routes(prefix="/api/v1", tags=["sessions"])
health = Routes(tags=["health"])

Config = Annotated[ClientConfigRequest, json_body(ClientConfigRequest)]
NewSession = Annotated[CreateSessionRequest, json_body(CreateSessionRequest)]
Beat = Annotated[SessionRequest, json_body(SessionRequest)]
Finish = Annotated[FinishSessionRequest, json_body(FinishSessionRequest)]
Events = Annotated[TelemetryRequest, json_body(TelemetryRequest)]


@router.post("/client/config", openapi_extra=takes(ClientConfigRequest))
async def client_config(message: Config) -> ClientConfig:
    """The SDK's switches, read once by each client."""
    return ClientConfig()


@router.post("/client/dynamic_config", openapi_extra=takes(ClientConfigRequest))
async def dynamic_config(message: Config) -> DynamicConfig:
    """The SDK's switches that it reads again and again."""
    return DynamicConfig()


@router.post("/create_session", openapi_extra=takes(CreateSessionRequest))
async def create_session(caller: TheCaller, message: NewSession) -> CreateSessionReply:
    """A new session."""
    async with caller.hub() as hub:
        return CreateSessionReply(session_id=await hub.sessions.create(caller.tenant, message))


@router.post("/session_heartbeat", openapi_extra=takes(SessionRequest))
async def session_heartbeat(caller: TheCaller, message: Beat) -> HeartbeatReply:
    """Keep a session alive; 410 once it is over."""
    async with caller.hub() as hub:
        await hub.sessions.require(caller.tenant, message.session_id)
    return HeartbeatReply()


@router.post("/sessions/{session_id}/finish", openapi_extra=takes(FinishSessionRequest))
async def finish_session(caller: TheCaller, session_id: str, message: Finish) -> Empty:
    """End a session; the first reason stays."""
    id = identifier(session_id, "session")
    async with caller.hub() as hub:
        await hub.sessions.finish(caller.tenant, id, message)
    return Empty()


@router.post("/telemetry", openapi_extra=takes(TelemetryRequest))
async def telemetry(message: Events) -> TelemetryReply:
    """Accepted, and dropped: it holds stack traces and more of the client's own affairs."""
    return TelemetryReply()


@router.get("/get_server_capabilities")
async def get_server_capabilities(caller: TheCaller) -> ServerCapabilities:
    """The base models by every name that they are served under."""
    async with caller.hub() as hub:
        return await hub.capabilities(caller.tenant)


@router.get("/healthz", tags=["health"])
@health.get("/healthz")
async def healthz() -> Health:
    """Whether the process lives."""
    return Health()


@health.get("/readyz", responses={503: {"model": Health}})
async def readyz(context: TheContext) -> Response:
    """Whether the engine answers; 503 until then."""
    ready = context.hub.ready()
    return json_response(Health(status="ok" if ready else "starting"), 200 if ready else 503)
