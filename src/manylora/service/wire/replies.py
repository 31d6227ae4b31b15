"""The JSON answers of the Tinker wire are pydantic models.

Fields without a default are those that the SDK (0.25 to 0.38) refuses to miss. An answer leaves out
what is None.
"""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from manylora.service.wire.messages import OptimizerConfig
from manylora.service.wire.paths import CheckpointType


class Reply(BaseModel):
    """What every answer has in common."""

    model_config = ConfigDict(frozen=True)


class Empty(Reply):
    """`{}`."""


class ErrorReply(Reply):
    """What a refused request is told, and what a failed future is (with status 200)."""

    error: str
    category: Literal["user", "server"]
    request_id: str | None = None


class Submitted(Reply):
    """A request that was taken, and how to ask for its result.

    Attributes:
        request_id: always the same for the same sequence number.
        model_id: whose order it stands in.
        sample_sequence_ids: one for each sample of `asample`; the SDK insists on it there.
    """

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


# --- sessions ---------------------------------------------------------------------------------


class ClientConfig(Reply):
    """Answer of client/config: the SDK's switches, set to what this server does.

    Attributes:
        create_model_via_load_weights: SDKs of the time of 0.25 ask; newer ones do it anyway.
    """

    pjwt_auth_enabled: bool = False
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    sample_use_retrieve_futures: bool = False
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = False
    create_model_via_load_weights: bool = True


class DynamicConfig(Reply):
    """Answer of client/dynamic_config."""

    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False
    sample_cancel_max_batch_size: int = 64


class CreateSessionReply(Reply):
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None
    type: Literal["create_session"] = "create_session"


class HeartbeatReply(Reply):
    type: Literal["session_heartbeat"] = "session_heartbeat"


class TelemetryReply(Reply):
    status: Literal["accepted"] = "accepted"


class Health(Reply):
    status: Literal["ok", "starting"] = "ok"


class SupportedModel(Reply):
    model_name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


class ServerCapabilities(Reply):
    supported_models: list[SupportedModel]


# --- models, training, sampling ---------------------------------------------------------------


class ModelData(Reply):
    """`model_name` is required in effect: the SDK finds the tokenizer by it."""

    model_name: str
    tokenizer_id: str | None = None
    arch: str | None = None


class ModelInfo(Reply):
    """Answer of get_info."""

    model_id: str
    model_data: ModelData
    is_lora: bool = True
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()
    type: Literal["get_info"] = "get_info"


class CreateModelReply(Reply):
    """Result of create_model."""

    model_id: str
    type: Literal["create_model"] = "create_model"


class LoadWeightsReply(Reply):
    """Result of load_weights."""

    model_id: str
    path: str
    type: Literal["load_weights"] = "load_weights"


class OptimStepReply(Reply):
    """Result of optim_step. A figure that is not finite stays one: the SDK's JSON reads NaN."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    metrics: dict[str, float]


class SaveWeightsReply(Reply):
    """Result of save_weights."""

    path: str
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsForSamplerReply(Reply):
    """Result of save_weights_for_sampler: a path if it was named, else a sampling session."""

    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternalReply(Reply):
    """Result of save_weights_external."""

    path: str
    size_bytes: int | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class CreateSamplingSessionReply(Reply):
    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class SamplerInfo(Reply):
    """Answer of samplers/{id}."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


# --- futures ----------------------------------------------------------------------------------

QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]


class TryAgain(Reply):
    """Answer of a poll whose result is not there yet (with status 408)."""

    request_id: str
    queue_state: QueueState
    queue_state_reason: str | None = None
    type: Literal["try_again"] = "try_again"


class CompleteMetadata(Reply):
    """Answer of a poll whose result is there and large: the SDK makes room, then asks again."""

    response_payload_size: int
    status: Literal["complete_metadata"] = "complete_metadata"


# --- checkpoints ------------------------------------------------------------------------------


class Cursor(Reply):
    offset: int
    limit: int
    total_count: int


class Checkpoint(Reply):
    """One checkpoint of a list.

    Attributes:
        checkpoint_id: `<kind>/<name>`.
        expires_at: None = never.
    """

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


class CheckpointList(Reply):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(Reply):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool = True
    last_request_time: datetime
    lora_rank: int | None = None
    corrupted: bool = False
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class TrainingRunList(Reply):
    training_runs: list[TrainingRun]
    cursor: Cursor


class WeightsInfo(Reply):
    base_model: str
    is_lora: bool = True
    lora_rank: int | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class CopyWeightsReply(Reply):
    """The path of the copy."""

    tinker_path: str


class ExternalWeightsUrls(Reply):
    """One signed address for each file of an external checkpoint."""

    urls: dict[str, str]
    expires: datetime
