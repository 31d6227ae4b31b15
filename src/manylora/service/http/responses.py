"""Answers are messages and errors, as Starlette sends them."""

from pydantic import BaseModel
from starlette.responses import Response

from manylora.service.contract import JSON_TYPE
from manylora.service.http_errors import ErrorAnswer, answer_to
from manylora.service.wire.replies import ErrorReply

RETRY_SECONDS = "1"


def json_response(message: BaseModel, status: int = 200) -> Response:
    """Return a message as it goes out: without what is None."""
    return Response(message.model_dump_json(exclude_none=True), status, media_type=JSON_TYPE)


def answer_response(answer: ErrorAnswer, request_id: str) -> Response:
    """Return a refusal as it goes out."""
    body = ErrorReply(error=answer.message, category=answer.category, request_id=request_id)
    response = json_response(body, answer.status)
    if answer.status in (429, 503):
        response.headers["Retry-After"] = RETRY_SECONDS
    return response


def error_response(error: BaseException, request_id: str) -> Response:
    """Return the answer to an error."""
    return answer_response(answer_to(error, request_id), request_id)
