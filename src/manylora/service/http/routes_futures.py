"""This route hands out results: one long poll for each promise."""

import asyncio
import time
from typing import Annotated

from starlette.responses import Response

from manylora.service.contract import JSON_TYPE, PROTOBUF_TYPE, Failed, Ready, Waiting
from manylora.service.http.context import Caller, Routes, TheCaller, json_body, takes
from manylora.service.http.responses import json_response
from manylora.service.wire.messages import RetrieveFutureRequest
from manylora.service.wire.replies import CompleteMetadata, ErrorReply, TryAgain

router = Routes(prefix="/api/v1", tags=["futures"])

Retrieve = Annotated[RetrieveFutureRequest, json_body(RetrieveFutureRequest)]


@router.post(
    "/retrieve_future",
    openapi_extra=takes(RetrieveFutureRequest),
    responses={200: {"content": {JSON_TYPE: {}, PROTOBUF_TYPE: {}}}, 408: {"model": TryAgain}},
)
async def retrieve_future(caller: TheCaller, message: Retrieve) -> Response:
    """A promise's result: JSON or protobuf by the request's kind, or how it failed.

    408 says "not yet", after a long wait: the SDK asks again at once. 404: no such promise.
    410: its result is gone.
    """
    settings, started = caller.context.settings, time.monotonic()
    outcome = await caller.context.hub.outcome(
        caller.tenant, message.request_id, settings.poll_seconds
    )
    match outcome:
        case Ready(content_type, body):
            if message.allow_metadata_only and len(body) > settings.whole_result:
                return json_response(CompleteMetadata(response_payload_size=len(body)))
            return Response(body, media_type=content_type)
        case Failed(error, category):
            return json_response(ErrorReply(error=error, category=category))
        case Waiting():
            return await _not_yet(caller, message.request_id, outcome, started)


async def _not_yet(caller: Caller, request_id: str, waiting: Waiting, started: float) -> Response:
    settings = caller.context.settings
    least = min(settings.least_poll_seconds, settings.poll_seconds)
    await asyncio.sleep(max(0.0, least - (time.monotonic() - started)))
    reply = TryAgain(
        request_id=request_id, queue_state=waiting.queue_state, queue_state_reason=waiting.reason
    )
    return json_response(reply, 408)
