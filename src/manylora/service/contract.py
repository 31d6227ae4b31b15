"""What the routes ask of the rest of the server: one protocol, and the outcomes of a request.

Every method takes the tenant first and sees only that tenant's things: an id of another tenant
raises exactly what a missing id raises (`errors.NotFound`, with the same words). Methods raise
`ManyloraError`s; `errors.answer_to` turns them into answers. They are called on the event loop, so
they hand anything slow to a thread.
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
    OptimStepRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
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
from manylora.service.wire.run_messages import (
    Adapter,
    AdapterList,
    Run,
    RunList,
    SubmitRunRequest,
)
from manylora.types import ManyloraError

JSON_TYPE = "application/json"
PROTOBUF_TYPE = "application/x-protobuf"


@dataclass(frozen=True, slots=True)
class Ready:
    """A request's result, as it goes out."""

    content_type: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that failed; the client gets these words."""

    error: str
    category: Category


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that is not done yet, and what holds it up."""

    queue_state: QueueState = "active"
    reason: str | None = None


Outcome = Ready | Failed | Waiting


class Archive(Protocol):
    """A file that is made for one reader.

    Attributes:
        size: its bytes.
    """

    size: int

    def chunks(self) -> AsyncIterator[bytes]:
        """What it holds, once."""
        ...

    def close(self) -> None:
        """Give its room back, read or not."""
        ...


class Hub(Protocol):
    """State behind the routes."""

    def ready(self) -> bool:
        """Whether the engine answers (for /readyz). Never blocks."""
        ...

    async def capabilities(self, tenant: str) -> ServerCapabilities:
        """The base models by every name that they are served under."""
        ...

    # --- sessions

    async def create_session(self, tenant: str, request: CreateSessionRequest) -> str:
        """A new session's id (no `/` in it)."""
        ...

    async def heartbeat(self, tenant: str, session_id: str) -> None:
        """Keep a session alive. Raises `Gone` once it is over."""
        ...

    async def finish_session(
        self, tenant: str, session_id: str, request: FinishSessionRequest
    ) -> None:
        """End a session; the first reason stays."""
        ...

    # --- models and training: each answers once the request is durable, and the same for a repeat

    async def create_model(self, tenant: str, request: CreateModelRequest) -> Submitted: ...

    async def load_weights(
        self, tenant: str, request: LoadWeightsRequest, path: TinkerPath
    ) -> Submitted: ...

    async def model_info(self, tenant: str, model_id: str) -> ModelInfo: ...

    async def forward_backward(self, tenant: str, outline: Outline) -> Submitted:
        """What is wrong with its tensors is found here too, and uses its number up."""
        ...

    async def optim_step(self, tenant: str, request: OptimStepRequest) -> Submitted: ...

    async def save_weights(self, tenant: str, request: SaveWeightsRequest) -> Submitted: ...

    async def save_weights_for_sampler(
        self, tenant: str, request: SaveWeightsForSamplerRequest
    ) -> Submitted: ...

    async def save_weights_external(
        self, tenant: str, request: SaveWeightsExternalRequest
    ) -> Submitted: ...

    async def refuse(self, tenant: str, model_id: str, seq_id: int, error: ManyloraError) -> None:
        """A numbered request was refused before it reached the hub: use its number up.

        The number counts as an operation that failed with `error`. Unknown models, and numbers
        that were used before, are nothing to speak of: no error.
        """
        ...

    # --- sampling

    async def create_sampling_session(
        self, tenant: str, request: CreateSamplingSessionRequest, path: TinkerPath | None
    ) -> str:
        """A sampling session's id; `path` is the request's model_path, taken apart."""
        ...

    async def sampler_info(self, tenant: str, sampling_session_id: str) -> SamplerInfo: ...

    async def sample(self, tenant: str, submit: SampleSubmit) -> Submitted:
        """`Submitted.sample_sequence_ids` has one id for each of `submit.num_samples`."""
        ...

    # --- results

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        """A request's outcome, waiting at most `timeout` seconds for it.

        Raises:
            NotFound: there never was such a request. Gone: its result's time to live has passed.
        """
        ...

    # --- runs that the server trains by itself, and open models

    async def submit_run(self, tenant: str, request: SubmitRunRequest) -> Run: ...

    async def runs(self, tenant: str, limit: int, offset: int) -> RunList: ...

    async def run(self, tenant: str, run_id: str, after: int) -> Run:
        """A run, with figures of its steps after that one."""
        ...

    async def cancel_run(self, tenant: str, run_id: str) -> Run: ...

    async def adapters(self, tenant: str) -> AdapterList: ...

    async def adapter(self, tenant: str, adapter_id: str) -> Adapter: ...

    async def close_adapter(self, tenant: str, adapter_id: str) -> Adapter: ...

    # --- checkpoints

    async def training_run(self, tenant: str, model_id: str) -> TrainingRun: ...

    async def training_runs(self, tenant: str, limit: int, offset: int) -> TrainingRunList: ...

    async def checkpoints_of(self, tenant: str, model_id: str) -> CheckpointList:
        """All checkpoints of one training run, without a cursor."""
        ...

    async def checkpoints(self, tenant: str, limit: int, offset: int) -> CheckpointList: ...

    async def delete_checkpoint(self, tenant: str, path: TinkerPath) -> None: ...

    async def set_ttl(self, tenant: str, path: TinkerPath, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire that many seconds from now; None = never."""
        ...

    async def set_public(self, tenant: str, path: TinkerPath, public: bool) -> None: ...

    async def weights_info(self, tenant: str, path: TinkerPath) -> WeightsInfo: ...

    async def copy_weights(
        self, tenant: str, request: CopyWeightsRequest, path: TinkerPath, key: str | None
    ) -> TinkerPath:
        """Copy the checkpoint at `path`; the same `key` again gives the same copy."""
        ...

    async def archive(self, tenant: str, path: TinkerPath) -> Archive:
        """A checkpoint's adapter as one tar of PEFT's files; whoever asks has to close it."""
        ...

    async def external_files(self, tenant: str, path: TinkerPath) -> Mapping[str, Path]:
        """The files of an external checkpoint: name inside it → file on disk."""
        ...
