"""The contract, a torch-free wall between bytes and state, is what routes ask of the server.

Every method takes the tenant first and sees only that tenant's things: an id of another tenant
raises exactly what a missing id raises (`http_errors.NotFound`, with the same words). Methods raise
`ManyloraError`s; `http_errors.answer_to` turns them into answers. They are called on the event
loop, so they hand anything slow to a thread.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from manylora.service.http_errors import Category
from manylora.service.wire.messages import (
    CopyWeightsRequest,
    CreateModelRequest,
    CreateSamplingSessionRequest,
    CreateSessionRequest,
    FinishSessionRequest,
    LoadWeightsRequest,
    LoraConfig,
    Numbered,
)
from manylora.service.wire.outline import Outline
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.pieces import SampleSubmit
from manylora.service.wire.replies import (
    CheckpointList,
    ModelInfo,
    QueueState,
    SamplerInfo,
    ServerCapabilities,
    Submitted,
    TrainingRun,
    TrainingRunList,
    WeightsInfo,
)
from manylora.service.wire.run_messages import Adapter, AdapterList, Run, RunList, SubmitRunRequest
from manylora.types import ManyloraError

JSON_TYPE = "application/json"
PROTOBUF_TYPE = "application/x-protobuf"


@dataclass(frozen=True, slots=True)
class Ready:
    """A `Ready` is a request's result, as it goes out."""

    content_type: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """A `Failed` is a request that failed; the client gets these words."""

    error: str
    category: Category


@dataclass(frozen=True, slots=True)
class Waiting:
    """A `Waiting` is a request that is not done yet, and what holds it up."""

    queue_state: QueueState = "active"
    reason: str | None = None


Outcome = Ready | Failed | Waiting


class Archive(Protocol):
    """An `Archive` is a file of `size` bytes that is made for one reader."""

    size: int

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield what it holds, once."""

    def close(self) -> None:
        """Give its room back, read or not."""


class SessionsApi(Protocol):
    """Sessions are client processes that say that they live."""

    async def create(self, tenant: str, request: CreateSessionRequest) -> str:
        """Return a new session's id (no `/` in it)."""

    async def require(self, tenant: str, session_id: str) -> object:
        """Keep a session alive. Raises `Gone` once it is over."""

    async def finish(self, tenant: str, session_id: str, request: FinishSessionRequest) -> None:
        """End a session; the first reason stays."""


class TrainingApi(Protocol):
    """These requests make adapters and operate on them.

    Each method answers once the request is durable, and gives the same answer to a repeated one.
    """

    async def create_model(
        self, tenant: str, request: CreateModelRequest, lora: LoraConfig
    ) -> Submitted:
        """Make an adapter; `lora` is the request's lora_config, which the route has seen to."""

    async def load_weights(
        self, tenant: str, request: LoadWeightsRequest, path: TinkerPath
    ) -> Submitted: ...

    async def forward_backward(self, tenant: str, outline: Outline) -> Submitted:
        """Take a forward_backward; a fault in its tensors is found here and uses its number up."""

    async def submit(self, tenant: str, request: Numbered) -> Submitted:
        """Take an operation whose message says all about it."""

    async def refuse(self, tenant: str, model_id: str, seq_id: int, error: ManyloraError) -> None:
        """Use up the number of a request that was refused before it reached the hub.

        The number counts as an operation that failed with `error`. Unknown models, and numbers
        that were used before, are no error.
        """


class SamplersApi(Protocol):
    """These requests make sampling sessions and ask for samples."""

    async def create(
        self, tenant: str, request: CreateSamplingSessionRequest, path: TinkerPath | None
    ) -> str:
        """Return a sampling session's id; `path` is the request's model_path, taken apart."""

    async def info(self, tenant: str, id: str) -> SamplerInfo: ...

    async def sample(self, tenant: str, submit: SampleSubmit) -> Submitted:
        """Sample; `Submitted.sample_sequence_ids` has one id for each of `submit.num_samples`."""


class RunsApi(Protocol):
    """The server trains these runs by itself."""

    async def submit(self, tenant: str, request: SubmitRunRequest) -> Run: ...

    async def page(self, tenant: str, limit: int, offset: int) -> RunList: ...

    async def get(self, tenant: str, id: str, after: int) -> Run:
        """Return a run, with figures of its steps after that one."""

    async def cancel(self, tenant: str, id: str) -> Run: ...


class AdaptersApi(Protocol):
    """These adapters are open."""

    async def page(self, tenant: str) -> AdapterList: ...

    async def get(self, tenant: str, id: str) -> Adapter: ...

    async def end(self, tenant: str, id: str) -> Adapter: ...


class TrainingRunsApi(Protocol):
    """Training runs are open or closed."""

    async def model_info(self, tenant: str, model_id: str) -> ModelInfo: ...

    async def get(self, tenant: str, model_id: str) -> TrainingRun: ...

    async def page(self, tenant: str, limit: int, offset: int) -> TrainingRunList: ...

    async def checkpoints(self, tenant: str, model_id: str) -> CheckpointList:
        """Return all checkpoints of one training run, without a cursor."""


class CheckpointsApi(Protocol):
    """Checkpoints are found by their `tinker://` paths."""

    async def page(self, tenant: str, limit: int, offset: int) -> CheckpointList: ...

    async def delete(self, tenant: str, path: TinkerPath) -> None: ...

    async def set_ttl(self, tenant: str, path: TinkerPath, seconds: int | None) -> None:
        """Let a checkpoint expire that many seconds from now; None = never."""

    async def set_public(self, tenant: str, path: TinkerPath, public: bool) -> None: ...

    async def info(self, tenant: str, path: TinkerPath) -> WeightsInfo: ...

    async def external_files(self, tenant: str, path: TinkerPath) -> Mapping[str, Path]:
        """Return the files of an external checkpoint: name inside it → file on disk."""


class CopiesApi(Protocol):
    """Checkpoints can be copied."""

    async def make(
        self, tenant: str, request: CopyWeightsRequest, path: TinkerPath, key: str | None
    ) -> TinkerPath:
        """Copy the checkpoint at `path`; the same `key` again gives the same copy."""


class ArchivesApi(Protocol):
    """Checkpoints can be downloaded as files."""

    async def open(self, tenant: str, path: TinkerPath) -> Archive:
        """A checkpoint's adapter as one tar of PEFT's files; the caller has to close it."""


class Hub(Protocol):
    """A `Hub` is the state behind the routes, one object for each kind of thing."""

    @property
    def sessions(self) -> SessionsApi: ...

    @property
    def training(self) -> TrainingApi: ...

    @property
    def samplers(self) -> SamplersApi: ...

    @property
    def runs(self) -> RunsApi: ...

    @property
    def adapters(self) -> AdaptersApi: ...

    @property
    def training_runs(self) -> TrainingRunsApi: ...

    @property
    def checkpoints(self) -> CheckpointsApi: ...

    @property
    def copies(self) -> CopiesApi: ...

    @property
    def archives(self) -> ArchivesApi: ...

    def ready(self) -> bool:
        """Return whether the engine answers (for /readyz). Never blocks."""

    async def capabilities(self, tenant: str) -> ServerCapabilities:
        """Return the base models by every name that they are served under."""

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        """Return a request's outcome, waiting at most `timeout` seconds for it. Raises NotFound:
        there never was such a request; Gone: its result's time to live has passed."""
