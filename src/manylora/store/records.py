"""Queries give and take these frozen copies of rows. Times are unix seconds (UTC)."""

from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

Json = dict[str, Any]
SamplerKind = Literal["base", "path", "snapshot", "inflight"]
CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page has some rows of a list, and says how many the whole list has."""

    rows: list[T]
    total: int


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A `KeyRow` is an API key, without what would let a client in; `prefix` is its first
    characters, to tell one from another."""

    id: str
    tenant: str
    prefix: str
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A `SessionRow` is a client process, as long as it says that it lives."""

    id: str
    tenant: str
    created_at: float
    last_seen_at: float
    tags: list[str] = field(default_factory=list)
    user_metadata: Json = field(default_factory=dict)
    sdk_version: str = ""
    ended_at: float | None = None
    end_reason: str | None = None
    end_detail: str | None = None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A `ModelRow` is a training run: one adapter of one session.

    Attributes:
        model_seq_id: its number in its session.
        base_model: the name that the client used.
        spec: rank, seed, what is trained.
        digest: of the request that created it; tells a repeated request from another one.
        source_path: the checkpoint that it began with.
        step: optimizer steps made.
        fault: why it can no longer be used.
    """

    id: str
    tenant: str
    session_id: str
    model_seq_id: int
    base_model: str
    spec: Json
    digest: str
    created_at: float
    last_request_at: float
    user_metadata: Json = field(default_factory=dict)
    source_path: str | None = None
    step: int = 0
    closed_at: float | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """A `SamplerRow` is a sampling session: whose weights a client's samples come from.

    Attributes:
        seq_id: its number in its session.
        model_path: the checkpoint that it serves.
        model_id: the model that it serves.
        snapshot: the weights' name; an `inflight` sampler's changes.
    """

    id: str
    tenant: str
    session_id: str
    seq_id: int
    digest: str
    kind: SamplerKind
    base_model: str
    created_at: float
    model_path: str | None = None
    model_id: str | None = None
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A `CheckpointRow` is of saved weights under a `tinker://` path.

    Attributes:
        folder: where the files lie, relative to the data directory.
        expires_at: from then on the checkpoint is gone for its owner; None = never.
        spec: rank and the like, so that the files need not be opened.
        request_id: the request that made it.
        step: the optimizer step that it was made after.
    """

    path: str
    tenant: str
    model_id: str
    kind: CheckpointKind
    name: str
    folder: str
    size_bytes: int
    created_at: float
    request_id: str
    spec: Json = field(default_factory=dict)
    step: int = 0
    expires_at: float | None = None
    public: bool = False
    user_metadata: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunRow:
    """A `RunRow` is a run file that was submitted to the server."""

    id: str
    tenant: str
    name: str
    config: str
    status: str
    created_at: float
    updated_at: float
    model_id: str | None = None
    error: str | None = None
    progress: Json = field(default_factory=dict)
