"""`tinker://<run>/<kind>/<name>` is the name of a checkpoint, and is made of these parts."""

import re
from dataclasses import dataclass
from typing import Literal, cast

from manylora.service.http_errors import missing
from manylora.types import DataError

PathKind = Literal["weights", "sampler_weights", "external_weights"]
CheckpointType = Literal["training", "sampler", "external"]

SCHEME = "tinker://"
# An identifier stands between slashes of a URL and in a file's name; a checkpoint's name is a
# folder, so it is not made of dots alone.
IDENTIFIER = r"^[A-Za-z0-9._:@=+-]+$"
CHECKPOINT_NAME = r"^[.]*[A-Za-z0-9_-][A-Za-z0-9._-]*$"
MAX_IDENTIFIER, MAX_NAME = 256, 128

_TYPES: dict[PathKind, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """A `TinkerPath` is one checkpoint's path.

    Attributes:
        model_id: the training run that it belongs to.
        kind: `weights` (adapter and optimizer), `sampler_weights` (adapter) or
            `external_weights` (PEFT's files, to be downloaded).
        name: the client's word for it.
    """

    model_id: str
    kind: PathKind
    name: str

    def __post_init__(self) -> None:
        if self.kind not in _TYPES:
            raise DataError(f"a checkpoint's kind is {self.kind!r}; there are: {', '.join(_TYPES)}")
        if not is_identifier(self.model_id):
            raise DataError("a checkpoint's training run is no identifier")
        if not _matches(CHECKPOINT_NAME, self.name, MAX_NAME):
            raise DataError(
                "a checkpoint's name may hold A-Z, a-z, 0-9, '.', '_' and '-', not dots alone, "
                f"and at most {MAX_NAME} characters"
            )

    def __str__(self) -> str:
        return f"{SCHEME}{self.model_id}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        """Lists of checkpoints show it as `<kind>/<name>`."""
        return f"{self.kind}/{self.name}"

    @property
    def checkpoint_type(self) -> CheckpointType:
        """The SDK has this word for the kind."""
        return _TYPES[self.kind]

    @classmethod
    def parse(cls, text: str) -> "TinkerPath":
        """Take a path apart. Raises DataError: it is not `tinker://<run>/<kind>/<name>`."""
        parts = text.removeprefix(SCHEME).split("/")
        if not text.startswith(SCHEME) or len(parts) != 3:
            raise DataError(
                f"{text[:MAX_IDENTIFIER]!r} is no checkpoint; a path is "
                f"{SCHEME}<training run>/<{'|'.join(_TYPES)}>/<name>"
            )
        return cls(parts[0], cast(PathKind, parts[1]), parts[2])


def _matches(pattern: str, text: str, longest: int) -> bool:
    return len(text) <= longest and re.fullmatch(pattern.strip("^$"), text) is not None


def is_identifier(text: str) -> bool:
    """Return whether a text can be an id."""
    return _matches(IDENTIFIER, text, MAX_IDENTIFIER)


def identifier(text: str, what: str) -> str:
    """Return an id out of a URL. Raises NotFound: it cannot be one, so it is no tenant's."""
    if not is_identifier(text):
        raise missing(what)
    return text


def order_place(model_id: object, seq_id: object) -> tuple[str, int] | None:
    """Return both, if they can be a place in a model's order."""
    if not isinstance(model_id, str) or type(seq_id) is not int or not 1 <= seq_id < 2**31:
        return None
    return (model_id, seq_id) if is_identifier(model_id) else None
