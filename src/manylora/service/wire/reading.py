"""The bytes of a JSON body become a message; of a bad one, the little that can be read."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from manylora.service.http_errors import Malformed
from manylora.service.wire.paths import order_place

MAX_COMPLAINTS = 5

M = TypeVar("M", bound=BaseModel)


def read_json(model: type[M], body: bytes) -> M:
    """Read a body as the message that its route takes. Raises Malformed: it is not one. The message
    names fields, and repeats nothing of what they hold."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise Malformed(complaints(error.errors(include_url=False, include_input=False))) from None


def complaints(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return validation errors as one line, `field.subfield: what is wrong`."""
    lines = []
    for error in errors[:MAX_COMPLAINTS]:
        where = ".".join(str(part)[:64] for part in error["loc"]) or "body"
        lines.append(f"{where}: {error['msg']}")
    if len(errors) > MAX_COMPLAINTS:
        lines.append(f"and {len(errors) - MAX_COMPLAINTS} more")
    return "; ".join(lines)


def peek_json_ids(prefix: bytes) -> tuple[str, int] | None:
    """Read model_id and seq_id of a numbered request from the start of a body, perhaps cut off."""
    try:
        content = from_json(prefix, allow_partial=True)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    return order_place(content.get("model_id"), content.get("seq_id"))
