"""A hub in memory, with two tenants' things, that writes down what it is asked."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from manylora.service.contract import (
    JSON_TYPE,
    PROTOBUF_TYPE,
    Failed,
    Outcome,
    Ready,
    Waiting,
)
from manylora.service.http_errors import Gone, missing
from manylora.service.wire import messages as m
from manylora.service.wire import replies as r
from manylora.service.wire import run_messages as plain
from manylora.service.wire.codec import encode_forward_backward
from manylora.service.wire.outline import Outline
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.pieces import SampleSubmit
from manylora.types import ForwardBackwardResult, ManyloraError

NOW = datetime(2026, 11, 1, tzinfo=UTC)
MODEL, SAMPLER, SESSION = "s1:train:0", "s1:sample:0", "s1"
WEIGHTS = TinkerPath(MODEL, "weights", "step-1")
EXTERNAL = TinkerPath(MODEL, "external_weights", "out")
OWNER = "alice"
RUN = plain.Run(id="run-1", name="mine", status="running", created_at=NOW, updated_at=NOW)
ADAPTER = plain.Adapter(
    adapter_id=MODEL,
    session_id=SESSION,
    base_model="base",
    rank=4,
    created_at=NOW,
    step=0,
    running=0,
)


class FakeArchive:
    """An archive of five bytes, which remembers whether it was closed."""

    size = 5
    closed = False

    async def chunks(self) -> AsyncIterator[bytes]:
        yield b"ar"
        yield b"hiv"

    def close(self) -> None:
        self.closed = True


class FakeHub:
    """`alice` owns a session, a model, a sampler and two checkpoints; nobody else owns any."""

    def __init__(self, files: Mapping[str, Path] | None = None) -> None:
        self.archives: list[FakeArchive] = []
        self.asked: list[tuple[str, Any]] = []
        self.refused: list[tuple[str, str, int, ManyloraError]] = []
        self.files = dict(files or {})
        self.is_ready = True
        self.broken: BaseException | None = None
        result = encode_forward_backward(ForwardBackwardResult((), 1.0, {}))
        self.outcomes: dict[str, Outcome | ManyloraError] = {
            "step": Ready(JSON_TYPE, b'{"metrics":{"grad_norm":1.0}}'),
            "forward": Ready(PROTOBUF_TYPE, result),
            "large": Ready(PROTOBUF_TYPE, b"\0" * 100),
            "failed": Failed("data[0]: too long", "user"),
            "waiting": Waiting("paused_capacity", "no room"),
            "old": Gone("the result is gone"),
        }

    def _note(self, tenant: str, what: Any, *known: bool, kind: str = "model") -> None:
        self.asked.append((tenant, what))
        if self.broken is not None:
            raise self.broken
        if tenant != OWNER or not all(known):
            raise missing(kind)

    def _promise(self, tenant: str, message: Any, model_id: str) -> r.Submitted:
        self._note(tenant, message, model_id == MODEL)
        return r.Submitted(request_id=f"{model_id}:{message.seq_id}", model_id=model_id)

    def ready(self) -> bool:
        return self.is_ready

    async def capabilities(self, tenant: str) -> r.ServerCapabilities:
        return r.ServerCapabilities(supported_models=[r.SupportedModel(model_name="base")])

    async def create_session(self, tenant: str, request: m.CreateSessionRequest) -> str:
        self.asked.append((tenant, request))
        if self.broken is not None:
            raise self.broken
        return SESSION

    async def heartbeat(self, tenant: str, session_id: str) -> None:
        if session_id == "over" and tenant == OWNER:
            raise Gone("the session is over")
        self._note(tenant, session_id, session_id == SESSION, kind="session")

    async def finish_session(
        self, tenant: str, session_id: str, request: m.FinishSessionRequest
    ) -> None:
        self._note(tenant, request, session_id == SESSION, kind="session")

    async def create_model(self, tenant: str, request: m.CreateModelRequest) -> r.Submitted:
        self._note(tenant, request, request.session_id == SESSION, kind="session")
        return r.Submitted(request_id="s1:create:0")

    async def load_weights(
        self, tenant: str, request: m.LoadWeightsRequest, path: TinkerPath
    ) -> r.Submitted:
        self._note(tenant, (request, path), path == WEIGHTS, kind="checkpoint")
        return r.Submitted(request_id="s1:load:0")

    async def model_info(self, tenant: str, model_id: str) -> r.ModelInfo:
        self._note(tenant, model_id, model_id == MODEL)
        return r.ModelInfo(model_id=MODEL, model_data=r.ModelData(model_name="base"), lora_rank=4)

    async def forward_backward(self, tenant: str, outline: Outline) -> r.Submitted:
        try:
            submit = outline.decode()
        except ManyloraError as error:
            await self.refuse(tenant, outline.model_id, outline.seq_id, error)
            raise
        return self._promise(tenant, submit, submit.model_id)

    async def optim_step(self, tenant: str, request: m.OptimStepRequest) -> r.Submitted:
        return self._promise(tenant, request, request.model_id)

    async def save_weights(self, tenant: str, request: m.SaveWeightsRequest) -> r.Submitted:
        return self._promise(tenant, request, request.model_id)

    async def save_weights_for_sampler(
        self, tenant: str, request: m.SaveWeightsForSamplerRequest
    ) -> r.Submitted:
        return self._promise(tenant, request, request.model_id)

    async def save_weights_external(
        self, tenant: str, request: m.SaveWeightsExternalRequest
    ) -> r.Submitted:
        return self._promise(tenant, request, request.model_id)

    async def refuse(self, tenant: str, model_id: str, seq_id: int, error: ManyloraError) -> None:
        self.refused.append((tenant, model_id, seq_id, error))

    async def create_sampling_session(
        self, tenant: str, request: m.CreateSamplingSessionRequest, path: TinkerPath | None
    ) -> str:
        self._note(tenant, (request, path), request.session_id == SESSION, kind="session")
        return SAMPLER

    async def sampler_info(self, tenant: str, sampling_session_id: str) -> r.SamplerInfo:
        self._note(tenant, sampling_session_id, sampling_session_id == SAMPLER, kind="sampler")
        return r.SamplerInfo(sampler_id=SAMPLER, base_model="base")

    async def sample(self, tenant: str, submit: SampleSubmit) -> r.Submitted:
        self._note(tenant, submit, submit.sampling_session_id == SAMPLER, kind="sampler")
        ids = [f"{SAMPLER}:{submit.seq_id}:{i}" for i in range(submit.num_samples)]
        return r.Submitted(request_id=f"{SAMPLER}:{submit.seq_id}", sample_sequence_ids=ids)

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        self._note(tenant, request_id, request_id in self.outcomes, kind="request")
        outcome = self.outcomes[request_id]
        if isinstance(outcome, ManyloraError):
            raise outcome
        return outcome

    async def submit_run(self, tenant: str, request: plain.SubmitRunRequest) -> plain.Run:
        self._note(tenant, request)
        return RUN

    async def runs(self, tenant: str, limit: int, offset: int) -> plain.RunList:
        self.asked.append((tenant, (limit, offset)))
        own = [RUN] if tenant == OWNER else []
        cursor = r.Cursor(offset=offset, limit=limit, total_count=len(own))
        return plain.RunList(runs=own, cursor=cursor)

    async def run(self, tenant: str, run_id: str, after: int) -> plain.Run:
        self._note(tenant, (run_id, after), run_id == RUN.id, kind="run")
        return RUN

    async def cancel_run(self, tenant: str, run_id: str) -> plain.Run:
        self._note(tenant, run_id, run_id == RUN.id, kind="run")
        return RUN

    async def adapters(self, tenant: str) -> plain.AdapterList:
        return plain.AdapterList(adapters=[ADAPTER] if tenant == OWNER else [])

    async def adapter(self, tenant: str, adapter_id: str) -> plain.Adapter:
        self._note(tenant, adapter_id, adapter_id == MODEL, kind="adapter")
        return ADAPTER

    async def close_adapter(self, tenant: str, adapter_id: str) -> plain.Adapter:
        self._note(tenant, adapter_id, adapter_id == MODEL, kind="adapter")
        return ADAPTER

    async def training_run(self, tenant: str, model_id: str) -> r.TrainingRun:
        self._note(tenant, model_id, model_id == MODEL, kind="training run")
        return self._run()

    async def training_runs(self, tenant: str, limit: int, offset: int) -> r.TrainingRunList:
        self.asked.append((tenant, (limit, offset)))
        runs = [self._run()] if tenant == OWNER else []
        cursor = r.Cursor(offset=offset, limit=limit, total_count=len(runs))
        return r.TrainingRunList(training_runs=runs, cursor=cursor)

    async def checkpoints_of(self, tenant: str, model_id: str) -> r.CheckpointList:
        self._note(tenant, model_id, model_id == MODEL, kind="training run")
        return r.CheckpointList(checkpoints=[self._checkpoint()])

    async def checkpoints(self, tenant: str, limit: int, offset: int) -> r.CheckpointList:
        self.asked.append((tenant, (limit, offset)))
        found = [self._checkpoint()] if tenant == OWNER else []
        cursor = r.Cursor(offset=offset, limit=limit, total_count=len(found))
        return r.CheckpointList(checkpoints=found, cursor=cursor)

    async def delete_checkpoint(self, tenant: str, path: TinkerPath) -> None:
        self._note(tenant, ("delete", path), path == WEIGHTS, kind="checkpoint")

    async def set_ttl(self, tenant: str, path: TinkerPath, ttl_seconds: int | None) -> None:
        self._note(tenant, (path, ttl_seconds), path == WEIGHTS, kind="checkpoint")

    async def set_public(self, tenant: str, path: TinkerPath, public: bool) -> None:
        self._note(tenant, (path, public), path == WEIGHTS, kind="checkpoint")

    async def weights_info(self, tenant: str, path: TinkerPath) -> r.WeightsInfo:
        self._note(tenant, path, path == WEIGHTS, kind="checkpoint")
        return r.WeightsInfo(base_model="base", lora_rank=4)

    async def copy_weights(
        self, tenant: str, request: m.CopyWeightsRequest, path: TinkerPath, key: str | None
    ) -> TinkerPath:
        self._note(tenant, (request, path, key), path == WEIGHTS, kind="checkpoint")
        return TinkerPath("c1:train:0", path.kind, path.name)

    async def archive(self, tenant: str, path: TinkerPath) -> "FakeArchive":
        self._note(tenant, path, path == WEIGHTS, kind="checkpoint")
        self.archives.append(FakeArchive())
        return self.archives[-1]

    async def external_files(self, tenant: str, path: TinkerPath) -> Mapping[str, Path]:
        self._note(tenant, path, path == EXTERNAL, kind="checkpoint")
        return self.files

    def _checkpoint(self) -> r.Checkpoint:
        return r.Checkpoint(
            checkpoint_id=WEIGHTS.checkpoint_id,
            checkpoint_type=WEIGHTS.checkpoint_type,
            time=NOW,
            tinker_path=str(WEIGHTS),
        )

    def _run(self) -> r.TrainingRun:
        return r.TrainingRun(
            training_run_id=MODEL,
            base_model="base",
            model_owner=OWNER,
            last_request_time=NOW,
            lora_rank=4,
        )
