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
CHECKPOINT = r.Checkpoint(
    checkpoint_id=WEIGHTS.checkpoint_id,
    checkpoint_type=WEIGHTS.checkpoint_type,
    time=NOW,
    tinker_path=str(WEIGHTS),
)
TRAINING_RUN = r.TrainingRun(
    training_run_id=MODEL,
    base_model="base",
    model_owner=OWNER,
    last_request_time=NOW,
    lora_rank=4,
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


class _Part:
    """What one kind of thing answers; the hub notes what was asked."""

    def __init__(self, hub: "FakeHub") -> None:
        self._hub = hub


class FakeSessions(_Part):
    """One session."""

    async def create(self, tenant: str, request: m.CreateSessionRequest) -> str:
        self._hub.asked.append((tenant, request))
        if self._hub.broken is not None:
            raise self._hub.broken
        return SESSION

    async def require(self, tenant: str, session_id: str) -> None:
        if session_id == "over" and tenant == OWNER:
            raise Gone("the session is over")
        self._hub.note(tenant, session_id, session_id == SESSION, kind="session")

    async def finish(self, tenant: str, session_id: str, request: m.FinishSessionRequest) -> None:
        self._hub.note(tenant, request, session_id == SESSION, kind="session")


class FakeTraining(_Part):
    """One model."""

    async def create_model(
        self, tenant: str, request: m.CreateModelRequest, lora: m.LoraConfig
    ) -> r.Submitted:
        self._hub.note(tenant, request, request.session_id == SESSION, kind="session")
        return r.Submitted(request_id="s1:create:0")

    async def load_weights(
        self, tenant: str, request: m.LoadWeightsRequest, path: TinkerPath
    ) -> r.Submitted:
        self._hub.note(tenant, (request, path), path == WEIGHTS, kind="checkpoint")
        return r.Submitted(request_id="s1:load:0")

    async def forward_backward(self, tenant: str, outline: Outline) -> r.Submitted:
        try:
            submit = outline.decode()
        except ManyloraError as error:
            await self.refuse(tenant, outline.model_id, outline.seq_id, error)
            raise
        return self._promise(tenant, submit, submit.model_id)

    async def submit(self, tenant: str, request: m.Numbered) -> r.Submitted:
        return self._promise(tenant, request, request.model_id)

    async def refuse(self, tenant: str, model_id: str, seq_id: int, error: ManyloraError) -> None:
        self._hub.refused.append((tenant, model_id, seq_id, error))

    def _promise(self, tenant: str, message: Any, model_id: str) -> r.Submitted:
        self._hub.note(tenant, message, model_id == MODEL)
        return r.Submitted(request_id=f"{model_id}:{message.seq_id}", model_id=model_id)


class FakeSamplers(_Part):
    """One sampler."""

    async def create(
        self, tenant: str, request: m.CreateSamplingSessionRequest, path: TinkerPath | None
    ) -> str:
        self._hub.note(tenant, (request, path), request.session_id == SESSION, kind="session")
        return SAMPLER

    async def info(self, tenant: str, id: str) -> r.SamplerInfo:
        self._hub.note(tenant, id, id == SAMPLER, kind="sampler")
        return r.SamplerInfo(sampler_id=SAMPLER, base_model="base")

    async def sample(self, tenant: str, submit: SampleSubmit) -> r.Submitted:
        self._hub.note(tenant, submit, submit.sampling_session_id == SAMPLER, kind="sampler")
        ids = [f"{SAMPLER}:{submit.seq_id}:{i}" for i in range(submit.num_samples)]
        return r.Submitted(request_id=f"{SAMPLER}:{submit.seq_id}", sample_sequence_ids=ids)


class FakeRuns(_Part):
    """One run."""

    async def submit(self, tenant: str, request: plain.SubmitRunRequest) -> plain.Run:
        self._hub.note(tenant, request)
        return RUN

    async def page(self, tenant: str, limit: int, offset: int) -> plain.RunList:
        self._hub.asked.append((tenant, (limit, offset)))
        own = [RUN] if tenant == OWNER else []
        cursor = r.Cursor(offset=offset, limit=limit, total_count=len(own))
        return plain.RunList(runs=own, cursor=cursor)

    async def get(self, tenant: str, id: str, after: int) -> plain.Run:
        self._hub.note(tenant, (id, after), id == RUN.id, kind="run")
        return RUN

    async def cancel(self, tenant: str, id: str) -> plain.Run:
        self._hub.note(tenant, id, id == RUN.id, kind="run")
        return RUN


class FakeAdapters(_Part):
    """One open adapter."""

    async def page(self, tenant: str) -> plain.AdapterList:
        return plain.AdapterList(adapters=[ADAPTER] if tenant == OWNER else [])

    async def get(self, tenant: str, id: str) -> plain.Adapter:
        self._hub.note(tenant, id, id == MODEL, kind="adapter")
        return ADAPTER

    async def end(self, tenant: str, id: str) -> plain.Adapter:
        self._hub.note(tenant, id, id == MODEL, kind="adapter")
        return ADAPTER


class FakeTrainingRuns(_Part):
    """One training run."""

    async def model_info(self, tenant: str, model_id: str) -> r.ModelInfo:
        self._hub.note(tenant, model_id, model_id == MODEL)
        return r.ModelInfo(model_id=MODEL, model_data=r.ModelData(model_name="base"), lora_rank=4)

    async def get(self, tenant: str, model_id: str) -> r.TrainingRun:
        self._hub.note(tenant, model_id, model_id == MODEL, kind="training run")
        return TRAINING_RUN

    async def page(self, tenant: str, limit: int, offset: int) -> r.TrainingRunList:
        self._hub.asked.append((tenant, (limit, offset)))
        runs = [TRAINING_RUN] if tenant == OWNER else []
        cursor = r.Cursor(offset=offset, limit=limit, total_count=len(runs))
        return r.TrainingRunList(training_runs=runs, cursor=cursor)

    async def checkpoints(self, tenant: str, model_id: str) -> r.CheckpointList:
        self._hub.note(tenant, model_id, model_id == MODEL, kind="training run")
        return r.CheckpointList(checkpoints=[CHECKPOINT])


class FakeCheckpoints(_Part):
    """Two checkpoints."""

    async def page(self, tenant: str, limit: int, offset: int) -> r.CheckpointList:
        self._hub.asked.append((tenant, (limit, offset)))
        found = [CHECKPOINT] if tenant == OWNER else []
        cursor = r.Cursor(offset=offset, limit=limit, total_count=len(found))
        return r.CheckpointList(checkpoints=found, cursor=cursor)

    async def delete(self, tenant: str, path: TinkerPath) -> None:
        self._hub.note(tenant, ("delete", path), path == WEIGHTS, kind="checkpoint")

    async def set_ttl(self, tenant: str, path: TinkerPath, seconds: int | None) -> None:
        self._hub.note(tenant, (path, seconds), path == WEIGHTS, kind="checkpoint")

    async def set_public(self, tenant: str, path: TinkerPath, public: bool) -> None:
        self._hub.note(tenant, (path, public), path == WEIGHTS, kind="checkpoint")

    async def info(self, tenant: str, path: TinkerPath) -> r.WeightsInfo:
        self._hub.note(tenant, path, path == WEIGHTS, kind="checkpoint")
        return r.WeightsInfo(base_model="base", lora_rank=4)

    async def external_files(self, tenant: str, path: TinkerPath) -> Mapping[str, Path]:
        self._hub.note(tenant, path, path == EXTERNAL, kind="checkpoint")
        return self._hub.files


class FakeCopies(_Part):
    """Copies that are only named."""

    async def make(
        self, tenant: str, request: m.CopyWeightsRequest, path: TinkerPath, key: str | None
    ) -> TinkerPath:
        self._hub.note(tenant, (request, path, key), path == WEIGHTS, kind="checkpoint")
        return TinkerPath("c1:train:0", path.kind, path.name)


class FakeArchives(_Part):
    """Archives, which are remembered."""

    def __init__(self, hub: "FakeHub") -> None:
        super().__init__(hub)
        self.opened: list[FakeArchive] = []

    async def open(self, tenant: str, path: TinkerPath) -> FakeArchive:
        self._hub.note(tenant, path, path == WEIGHTS, kind="checkpoint")
        self.opened.append(FakeArchive())
        return self.opened[-1]


class FakeHub:
    """`alice` owns a session, a model, a sampler and two checkpoints; nobody else owns any."""

    def __init__(self, files: Mapping[str, Path] | None = None) -> None:
        self.sessions = FakeSessions(self)
        self.training = FakeTraining(self)
        self.samplers = FakeSamplers(self)
        self.runs = FakeRuns(self)
        self.adapters = FakeAdapters(self)
        self.training_runs = FakeTrainingRuns(self)
        self.checkpoints = FakeCheckpoints(self)
        self.copies = FakeCopies(self)
        self.archives = FakeArchives(self)
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

    def note(self, tenant: str, what: Any, *known: bool, kind: str = "model") -> None:
        self.asked.append((tenant, what))
        if self.broken is not None:
            raise self.broken
        if tenant != OWNER or not all(known):
            raise missing(kind)

    def ready(self) -> bool:
        return self.is_ready

    async def capabilities(self, tenant: str) -> r.ServerCapabilities:
        return r.ServerCapabilities(supported_models=[r.SupportedModel(model_name="base")])

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        self.note(tenant, request_id, request_id in self.outcomes, kind="request")
        outcome = self.outcomes[request_id]
        if isinstance(outcome, ManyloraError):
            raise outcome
        return outcome
