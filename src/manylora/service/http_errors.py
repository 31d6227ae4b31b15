"""This module holds the service's errors, and the one table from errors to what a client is told.

Why these numbers: the SDK raises at once on 400, 401, 403, 404, 413, 415 and 422, retries 408, 409,
429 and 5xx for up to five minutes, and takes 410 for a result or session that is gone. So a name
that is taken is a 400, never a 409, and what the server will never do is a 400, never a 501.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from manylora.types import (
    AdapterNotFound,
    BaseModelError,
    Cancelled,
    CheckpointDamaged,
    CheckpointError,
    CheckpointExists,
    Conflict,
    DataError,
    DoesNotFit,
    ManyloraError,
    SaveFailed,
    StoreError,
)
from manylora.types.files import no_descriptor_left

Category = Literal["user", "server"]

logger = logging.getLogger("manylora.service")


class NotFound(ManyloraError, KeyError):
    """The tenant has no such session, model, sampler, request or checkpoint."""


class Gone(ManyloraError):
    """A session is over, or a result's time to live has passed."""


class Unauthenticated(ManyloraError):
    """The request carries no key, or none that is known."""


class Malformed(DataError):
    """A message does not have the form that its route takes; it names the fields."""


class WrongEncoding(ManyloraError):
    """A body has a content type or content encoding that its route does not take."""


class TooLarge(ManyloraError):
    """A body, or something in it, is beyond a limit; the message says which."""


class TooSlow(ManyloraError):
    """A body does not come on; the same request may be sent again."""


class WrongHost(ManyloraError):
    """A request was meant for another host than this server."""


class QuotaExceeded(ManyloraError):
    """A tenant has all that it may have; retrying alone will not help."""


class Backpressure(ManyloraError):
    """There is no room now; the client should come again in a moment."""


def missing(what: str) -> NotFound:
    """Return the error for an id that does not exist or is another tenant's: the same words."""
    return NotFound(f"there is no such {what}")


class ModelFault(ManyloraError):
    """A model can no longer be used; the message says why and what is left of it."""


class Lost(ManyloraError):
    """A request was accepted and cannot be run. A damaged part of the journal took it, or the
    engine breaks down over it."""


class NotReady(ManyloraError):
    """The server is still starting."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An `ErrorAnswer` is what a client is told of an error."""

    status: int
    message: str
    category: Category


# The first row that fits counts. What is not here is our own fault.
_STATUS: tuple[tuple[type[ManyloraError], int, Category], ...] = (
    (Unauthenticated, 401, "user"),
    (NotFound, 404, "user"),
    (AdapterNotFound, 404, "user"),
    (Gone, 410, "user"),
    (TooSlow, 408, "user"),
    (TooLarge, 413, "user"),
    (WrongEncoding, 415, "user"),
    (Malformed, 422, "user"),
    (Backpressure, 429, "server"),
    (CheckpointDamaged, 400, "server"),
    (ModelFault, 400, "server"),
    (Lost, 400, "server"),
    (SaveFailed, 503, "server"),
    (NotReady, 503, "server"),
    (Conflict, 400, "user"),
    (DoesNotFit, 400, "user"),
    (CheckpointExists, 400, "user"),
    (StoreError, 503, "server"),
    (BaseModelError, 503, "server"),
    (Cancelled, 503, "server"),
    (CheckpointError, 400, "user"),
    (ManyloraError, 400, "user"),
)


def answer_to(error: BaseException, request_id: str) -> ErrorAnswer:
    """Return what to tell the client of this error.

    An error raised on purpose keeps its message. Any other is logged here, whole, and the client
    learns only where to look.
    """
    if no_descriptor_left(error):
        logger.warning("request %s found no file descriptor left: %s", request_id, error)
        words = "the server has as many files open as it may; try again soon"
        return ErrorAnswer(503, words, "server")
    for kind, status, category in _STATUS:
        if isinstance(error, kind):
            return ErrorAnswer(status, str(error), category)
    logger.error("request %s failed", request_id, exc_info=error)
    return ErrorAnswer(500, f"internal error, request id {request_id}", "server")
