"""The JSON requests of the Tinker wire are pydantic models.

Unknown fields are ignored (the SDK gains some every month); known ones are strict: every text,
list and number has a bound, and `NaN` is no number. What is known and not done (another optimizer,
images, encryption) has a field here, so that it can be refused by name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from manylora.service.wire.paths import CHECKPOINT_NAME, IDENTIFIER, MAX_IDENTIFIER, MAX_NAME
from manylora.service.wire.reading import peek_json_ids
from manylora.service.wire.scan import peek_ids

SECONDS_OF_AN_HOUR, SECONDS_OF_TEN_YEARS = 3600, 315_360_000

Identifier = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_IDENTIFIER, pattern=IDENTIFIER)
]
# PostgreSQL cannot store a NUL.
Text = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")]
Word = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00]*$")]
Path = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[\x21-\x7e]+$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME, pattern=CHECKPOINT_NAME)]
BaseName = Annotated[
    str, StringConstraints(min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")
]
SequenceNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
OrderNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]  # a model's own numbers start at 1
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TTL = Annotated[int, Field(ge=SECONDS_OF_AN_HOUR, le=SECONDS_OF_TEN_YEARS)]


def _texts(value: object) -> object:
    """Return metadata values as text: the SDK promises texts when it reads them back."""
    if not isinstance(value, dict):
        return value
    return {
        key: item if isinstance(item, str) else json.dumps(item, sort_keys=True)
        for key, item in value.items()
    }


def _not_too_much(value: dict[str, str]) -> dict[str, str]:
    size = sum(len(key.encode("utf-8", "surrogatepass")) for key in value)
    size += sum(len(text.encode("utf-8", "surrogatepass")) for text in value.values())
    if size > METADATA_BYTES:
        raise ValueError(f"metadata of {size:,} bytes; at most {METADATA_BYTES:,}")
    return value


# It is kept in memory, in the journal and in the database, with everything that has some.
METADATA_BYTES = 16_384
Metadata = Annotated[
    dict[Word, Text], BeforeValidator(_texts), AfterValidator(_not_too_much), Field(max_length=128)
]


class WireRequest(BaseModel):
    """What every request has in common."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


# --- sessions ---------------------------------------------------------------------------------


class ClientConfigRequest(WireRequest):
    """POST client/config and client/dynamic_config."""

    sdk_version: Word = ""


class CreateSessionRequest(WireRequest):
    """POST create_session."""

    tags: Annotated[list[Word], Field(max_length=128)] = []
    user_metadata: Metadata | None = None
    sdk_version: Word = ""
    project_id: Word | None = None
    display_name: Word | None = None


class SessionRequest(WireRequest):
    """POST session_heartbeat."""

    session_id: Identifier


class FinishReason(WireRequest):
    type: Literal["success", "errored", "interrupted"]


class FinishSessionRequest(WireRequest):
    """POST sessions/{id}/finish."""

    reason: FinishReason
    detail: Text | None = None


class TelemetryRequest(WireRequest):
    """POST telemetry. The events are counted and dropped."""

    events: Annotated[list[Any], Field(max_length=10_000)] = []
    session_id: Word = ""


# --- models and training ----------------------------------------------------------------------


class OptimizerConfig(WireRequest):
    """The optimizer's family; only `adamw` is served."""

    type: Word = "adamw"


class LoraConfig(WireRequest):
    rank: Annotated[int, Field(ge=1, le=65_536)]
    seed: Seed | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Slot(NamedTuple):
    """A `Slot` holds an adapter in a session: the session's id, the adapter's number there."""

    session_id: str
    number: int

    @property
    def model_id(self) -> str:
        """The adapter has this id, which the SDK works out for itself when a load makes it."""
        return f"{self.session_id}:train:{self.number}"


class OrderPlace(NamedTuple):
    """An `OrderPlace` is in an adapter's own order: the adapter's id, the operation's number."""

    model_id: str
    seq_id: int


class CreateModelRequest(WireRequest):
    """POST create_model."""

    session_id: Identifier
    model_seq_id: SequenceNumber
    base_model: BaseName
    lora_config: LoraConfig | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class ModelRequest(WireRequest):
    """POST get_info, and unload_model of older SDKs."""

    model_id: Identifier


class Numbered(WireRequest):
    """A request in a model's own order."""

    model_id: Identifier
    seq_id: OrderNumber

    @property
    def place(self) -> OrderPlace:
        """It has this place in that order."""
        return OrderPlace(self.model_id, self.seq_id)


class WireAdamParams(WireRequest):
    learning_rate: float = 0.0001
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OtherOptimizerParams(WireRequest):
    type: Word


class OptimStepRequest(Numbered):
    """POST optim_step."""

    adam_params: WireAdamParams | None = None
    optimizer_params: OtherOptimizerParams | None = None

    @model_validator(mode="after")
    def _one_optimizer(self) -> "OptimStepRequest":
        if (self.adam_params is None) == (self.optimizer_params is None):
            raise ValueError("give adam_params")
        return self


class LoadWeightsRequest(WireRequest):
    """POST load_weights: into a new model (session_id), or into one just made (model_id)."""

    path: Path
    optimizer: bool
    session_id: Identifier | None = None
    model_seq_id: SequenceNumber | None = None
    model_id: Identifier | None = None
    seq_id: OrderNumber | None = None
    base_model: BaseName | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: Text | None = None

    @model_validator(mode="after")
    def _one_address(self) -> "LoadWeightsRequest":
        numbers = (self.session_id, self.model_seq_id, self.model_id, self.seq_id)
        given = tuple(number is not None for number in numbers)
        if given not in ((True, True, False, False), (False, False, True, True)):
            raise ValueError("give session_id and model_seq_id, or model_id and seq_id")
        return self

    @property
    def target(self) -> Slot | OrderPlace:
        """It makes the adapter of this slot, or has this place among an adapter's operations."""
        if self.session_id is not None and self.model_seq_id is not None:
            return Slot(self.session_id, self.model_seq_id)
        return OrderPlace(self.model_id or "", self.seq_id or 0)


class CopyWeightsRequest(WireRequest):
    """POST copy_weights: into a slot of a session, or by itself. There are no projects: any name
    of one is taken, and the copy is the caller's."""

    source_path: Path
    session_id: Identifier | None = None
    model_seq_id: SequenceNumber | None = None
    destination_project_id: Word | None = None
    ttl_seconds: TTL | None = None
    weights_access_token: Text | None = None

    @model_validator(mode="after")
    def _one_destination(self) -> "CopyWeightsRequest":
        slot = (self.session_id is not None, self.model_seq_id is not None)
        if slot != (self.destination_project_id is None,) * 2:
            raise ValueError("give destination_project_id, or session_id and model_seq_id")
        return self


class SaveWeightsRequest(Numbered):
    """POST save_weights."""

    path: Name | None = None
    ttl_seconds: TTL | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveWeightsForSamplerRequest(Numbered):
    """POST save_weights_for_sampler: a named checkpoint, or an ephemeral sampler."""

    path: Name | None = None
    sampling_session_seq_id: SequenceNumber | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: TTL | None = None
    user_metadata: Metadata | None = None

    @model_validator(mode="after")
    def _one_target(self) -> "SaveWeightsForSamplerRequest":
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("give path or sampling_session_seq_id, and not both")
        return self


class SaveWeightsExternalRequest(Numbered):
    """POST save_weights_external."""

    path: Name
    ttl_seconds: TTL | None = None
    age_encryption_recipients: Annotated[list[Text], Field(max_length=64)] | None = None


# --- the kinds of numbered requests -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationKind:
    """An `OperationKind` is what is known of a kind of numbered request, beside `Operations`.

    Attributes:
        name: its route's, and the journal's word for it.
        message: its JSON body; None = it comes in protobuf.
        peek: finds model_id and seq_id in the start of a body that is refused.
        trains: whether it cannot run without the adapter's state.
        leaves_no_trace: whether one of that content leaves the adapter as it was.
        sampler: the number, in the session, of the sampler that one of that content makes.
    """

    name: str
    message: type[WireRequest] | None = None
    peek: Callable[[bytes], tuple[str, int] | None] = peek_json_ids
    trains: bool = False
    leaves_no_trace: Callable[[Any], bool] = lambda content: False
    sampler: Callable[[Any], int | None] = lambda content: None


KINDS = {
    kind.name: kind
    for kind in (
        OperationKind(
            name="forward_backward",
            peek=peek_ids,
            trains=True,
            leaves_no_trace=lambda content: content.forward_only,
        ),
        OperationKind(name="optim_step", message=OptimStepRequest, trains=True),
        OperationKind(
            name="save_weights", message=SaveWeightsRequest, leaves_no_trace=lambda content: True
        ),
        OperationKind(
            name="save_weights_for_sampler",
            message=SaveWeightsForSamplerRequest,
            leaves_no_trace=lambda content: content.path is not None,
            sampler=lambda content: content.sampling_session_seq_id,
        ),
        OperationKind(
            name="save_weights_external",
            message=SaveWeightsExternalRequest,
            leaves_no_trace=lambda content: True,
        ),
        OperationKind(name="load_weights", message=LoadWeightsRequest),
    )
}
KIND_OF_MESSAGE: Mapping[type[BaseModel], OperationKind] = {
    kind.message: kind for kind in KINDS.values() if kind.message is not None
}
# No route's: an operation whose number was used up by a request that was refused.
REFUSED = OperationKind(name="refused")


# --- sampling ---------------------------------------------------------------------------------


class CreateSamplingSessionRequest(WireRequest):
    """POST create_sampling_session."""

    session_id: Identifier
    sampling_session_seq_id: SequenceNumber
    base_model: BaseName | None = None
    model_path: Path | None = None

    @model_validator(mode="after")
    def _some_weights(self) -> "CreateSamplingSessionRequest":
        if self.base_model is None and self.model_path is None:
            raise ValueError("give base_model or model_path")
        return self


Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopText = Annotated[str, StringConstraints(max_length=1024)]


class WireChunk(WireRequest):
    """A piece of a prompt; only `encoded_text` is served."""

    type: Word = "encoded_text"
    tokens: list[Token] | None = None


class WirePrompt(WireRequest):
    chunks: Annotated[list[WireChunk], Field(max_length=4096)]


class WireSamplingParams(WireRequest):
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    seed: Seed | None = None
    stop: (
        StopText
        | Annotated[list[StopText], Field(max_length=256)]
        | Annotated[list[Token], Field(max_length=256)]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class WireTensor(WireRequest):
    """A tensor of the JSON requests: whole numbers, dense or CSR."""

    data: list[Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]]
    dtype: Literal["int64"] = "int64"
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=2)] | None = None
    sparse_crow_indices: list[Annotated[int, Field(ge=0, le=2**31)]] | None = None
    sparse_col_indices: list[Annotated[int, Field(ge=0, le=2**31)]] | None = None


class SampleRequest(WireRequest):
    """POST asample."""

    sampling_session_id: Identifier
    # Copies of a sampling client count in blocks of 10⁹ from a random one of 10⁹ blocks.
    seq_id: Annotated[int, Field(ge=0, le=2**63 - 1)]
    num_samples: Annotated[int, Field(ge=1, le=65_536)] = 1
    prompt: WirePrompt
    sampling_params: WireSamplingParams = WireSamplingParams()
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: Annotated[int, Field(ge=1, le=2**31)] | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=65_536)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=65_536)] = 0
    target_prompt_logprobs: WireTensor | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=65_536)] = 0
    record_stability_info: bool | None = None


# --- futures and checkpoints ------------------------------------------------------------------


class RetrieveFutureRequest(WireRequest):
    """POST retrieve_future."""

    request_id: Identifier
    allow_metadata_only: bool = False


class WeightsInfoRequest(WireRequest):
    """POST weights_info."""

    tinker_path: Path


class TTLRequest(WireRequest):
    """PUT …/checkpoints/{kind}/{name}/ttl; null = never expires."""

    ttl_seconds: TTL | None
