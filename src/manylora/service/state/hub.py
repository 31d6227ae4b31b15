"""The state behind the routes: sessions, models, samplers, checkpoints and results, composed.

Each has a file of its own; here is only what concerns several of them.
"""

import asyncio
import logging
import time

from manylora.service.contract import JSON_TYPE, Outcome, Waiting
from manylora.service.state.archives import Archives
from manylora.service.state.checkpoint_queries import Shelves
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.copies import Copies
from manylora.service.state.missing import Missing
from manylora.service.state.open_adapters import OpenAdapters, seed_of
from manylora.service.state.plain_api import Plain
from manylora.service.state.resources import Resources
from manylora.service.state.samplers import Samplers
from manylora.service.state.sessions import Sessions
from manylora.service.state.submitted_runs import SubmittedRuns
from manylora.service.state.wire_operations import OperationRequest, Operations, adapter_spec
from manylora.service.wire.codec import digest_json
from manylora.service.wire.messages import (
    CreateModelRequest,
    CreateSamplingSessionRequest,
    CreateSessionRequest,
    FinishSessionRequest,
    LoadWeightsRequest,
    Numbered,
    OptimStepRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)
from manylora.service.wire.outline import Outline
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.pieces import SampleSubmit
from manylora.service.wire.replies import (
    CreateModelReply,
    LoadWeightsReply,
    ModelData,
    ModelInfo,
    Reply,
    SamplerInfo,
    ServerCapabilities,
    Submitted,
    SupportedModel,
)
from manylora.store import CheckpointRow, ModelRow
from manylora.types import DataError, ManyloraError, Unsupported

log = logging.getLogger("manylora.service")

# The number of the request that makes a model; its client's own numbers begin after it.
CREATION = 0
# A tenant with more than this many batches queued is told that it waits for room.
MANY_BATCHES = 16


class TinkerHub(Shelves, Plain):
    """`contract.Hub`, over one engine and one data directory."""

    def __init__(self, parts: Resources):
        self.parts = parts
        self.keeping = Checkpoints(parts.store, parts.folder, parts.settings)
        self.sessions = Sessions(parts.store, parts.clock, parts.settings.quotas.sessions)
        self.copies = Copies(parts, self.keeping, self.sessions)
        self.archives = Archives(parts, self.keeping)
        self.samplers = Samplers(parts, self.keeping)
        operations = Operations(parts, self.keeping, self.samplers.publish)
        self.models = OpenAdapters(parts, operations)
        self.submitted = SubmittedRuns(parts, self.keeping)
        self.missing = Missing(self.models, self.samplers, parts.wall())
        # A copy must not replace what a model has learned since an equal request made it.
        self._loading = asyncio.Lock()

    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.parts.promises.closing

    async def capabilities(self, tenant: str) -> ServerCapabilities:
        """The base by every name that it is served under."""
        context = self.parts.host.engine.base.context_length
        return ServerCapabilities(
            supported_models=[
                SupportedModel(model_name=name, max_context_length=context)
                for name in self.parts.base_names
            ]
        )

    # -- sessions ---------------------------------------------------

    async def create_session(self, tenant: str, request: CreateSessionRequest) -> str:
        return await self.sessions.create(tenant, request)

    async def heartbeat(self, tenant: str, session_id: str) -> None:
        await self.sessions.require(tenant, session_id)

    async def finish_session(
        self, tenant: str, session_id: str, request: FinishSessionRequest
    ) -> None:
        session = await self.sessions.finish(tenant, session_id, request)
        if session is not None:
            # What is queued still runs; the client need not wait for that.
            self.parts.in_background(self.close_models(session.tenant, session.id))

    async def close_models(self, tenant: str, session_id: str) -> None:
        """Free what a session that is over had open, once what is queued for it has run."""
        own = [model for model in self.models if model.row.session_id == session_id]
        await asyncio.gather(*(self.models.close(model) for model in own))
        await self.samplers.forget_session(tenant, session_id)

    # -- making models ---------------------------------------------------

    async def create_model(self, tenant: str, request: CreateModelRequest) -> Submitted:
        await self.sessions.require(tenant, request.session_id)
        if request.lora_config is None:
            raise Unsupported("full fine-tuning is not done here; give a lora_config")
        if request.optimizer_config.type != "adamw":
            raise Unsupported(
                f"optimizer {request.optimizer_config.type!r} is not done here: adamw"
            )
        self.check_base(request.base_model)
        lora, limit = request.lora_config, self.parts.settings.limits.rank
        if lora.rank > limit:
            raise DataError(f"lora_config.rank is {lora.rank}; at most {limit} here")
        id = _model_id(request.session_id, request.model_seq_id)
        spec: dict[str, object] = {
            "rank": lora.rank,
            "seed": seed_of(id) if lora.seed is None else lora.seed,
            "train_attn": lora.train_attn,
            "train_mlp": lora.train_mlp,
            "train_unembed": lora.train_unembed,
            "base_model": request.base_model,
        }
        adapter = adapter_spec(spec, self.parts.host.engine.sites)
        row = self._new_row(tenant, id, request, request.base_model, spec, digest_json(request))
        if await self._add(row):
            host = self.parts.host
            made = host.call(id, lambda pager: pager.create(id, adapter), tenant=tenant)
            reply = CreateModelReply(model_id=id)
            self.parts.promises.follow(_creation_of(id), made, lambda _: _json(reply))
        return Submitted(request_id=_creation_of(id), model_id=id)

    async def load_weights(
        self, tenant: str, request: LoadWeightsRequest, path: TinkerPath
    ) -> Submitted:
        checkpoint = await self.keeping.readable(tenant, path, "weights")
        if not request.creates:
            assert request.model_id is not None and request.seq_id is not None
            content = (request, checkpoint)
            return await self.models.submit(
                tenant, request.model_id, request.seq_id, OperationRequest("load_weights", content),
                request.model_dump_json().encode(), digest_json(request),
            )  # fmt: skip
        assert request.session_id is not None and request.model_seq_id is not None
        await self.sessions.require(tenant, request.session_id)
        if request.base_model is not None:
            self.check_base(request.base_model)
        async with self._loading:
            return await self._create_from(tenant, request, path, checkpoint)

    async def _create_from(
        self, tenant: str, request: LoadWeightsRequest, path: TinkerPath, checkpoint: CheckpointRow
    ) -> Submitted:
        """A new model that begins with a checkpoint. A load is a copy of files, made before it is
        acknowledged: from here on the model does not depend on the checkpoint."""
        assert request.session_id is not None and request.model_seq_id is not None
        id = _model_id(request.session_id, request.model_seq_id)
        spec = dict(checkpoint.spec)
        base = request.base_model or str(spec["base_model"])
        host, folder = self.parts.host, self.keeping.folder_of(checkpoint)
        adapter = adapter_spec(spec, host.engine.sites)
        if not self.models.is_open(id):
            await asyncio.to_thread(
                host.adopt, id, folder, spec=adapter, moments=request.optimizer, called=str(path)
            )
        row = self._new_row(tenant, id, request, base, spec, digest_json(request), str(path))
        if await self._add(row):
            registered = host.call(id, lambda pager: pager.register(id, adapter, 0), tenant=tenant)
            reply = LoadWeightsReply(model_id=id, path=str(path))
            self.parts.promises.follow(_creation_of(id), registered, lambda _: _json(reply))
        return Submitted(request_id=_creation_of(id), model_id=id)

    async def model_info(self, tenant: str, model_id: str) -> ModelInfo:
        row = await self.models.row(tenant, model_id)
        return ModelInfo(
            model_id=model_id,
            model_data=ModelData(model_name=row.base_model, tokenizer_id=row.base_model),
            lora_rank=int(row.spec["rank"]),
            model_name=row.base_model,
        )

    # -- operations ---------------------------------------------------

    async def forward_backward(self, tenant: str, outline: Outline) -> Submitted:
        request = OperationRequest("forward_backward", outline, outline.num_tokens)
        return await self.models.submit(
            tenant, outline.model_id, outline.seq_id, request, outline.body, outline.digest
        )

    async def optim_step(self, tenant: str, request: OptimStepRequest) -> Submitted:
        return await self._submit(tenant, "optim_step", request)

    async def save_weights(self, tenant: str, request: SaveWeightsRequest) -> Submitted:
        return await self._submit(tenant, "save_weights", request)

    async def save_weights_for_sampler(
        self, tenant: str, request: SaveWeightsForSamplerRequest
    ) -> Submitted:
        # A retry of an ephemeral save comes with another number for its sampler.
        digest = digest_json(request.model_copy(update={"sampling_session_seq_id": 0}))
        if request.sampling_session_seq_id is not None:
            model = await self.models.require(tenant, request.model_id)
            if not model.order.is_repeated(request.seq_id, digest):
                await self.samplers.of_model(
                    tenant, model.row.session_id, model.id, model.row.base_model,
                    request.sampling_session_seq_id, request.kind,
                )  # fmt: skip
        return await self._submit(tenant, "save_weights_for_sampler", request, digest)

    async def save_weights_external(
        self, tenant: str, request: SaveWeightsExternalRequest
    ) -> Submitted:
        if request.age_encryption_recipients:
            raise Unsupported("age encryption is not done here; save without recipients")
        return await self._submit(tenant, "save_weights_external", request)

    async def refuse(self, tenant: str, model_id: str, seq_id: int, error: ManyloraError) -> None:
        await self.models.refuse(tenant, model_id, seq_id, error)

    # -- sampling ---------------------------------------------------

    async def create_sampling_session(
        self, tenant: str, request: CreateSamplingSessionRequest, path: TinkerPath | None
    ) -> str:
        await self.sessions.require(tenant, request.session_id)
        return await self.samplers.create(tenant, request, path, digest_json(request))

    async def sampler_info(self, tenant: str, sampling_session_id: str) -> SamplerInfo:
        return await self.samplers.info(tenant, sampling_session_id)

    async def sample(self, tenant: str, submit: SampleSubmit) -> Submitted:
        return await self.samplers.sample(tenant, submit)

    # -- results ---------------------------------------------------

    async def outcome(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        promises = self.parts.promises
        outcome = await promises.outcome(tenant, request_id, timeout)
        if outcome is None and request_id in promises:  # it came just now
            outcome = await promises.outcome(tenant, request_id, timeout)
        if isinstance(outcome, Waiting):
            count, tokens = self.parts.host.waiting(tenant)
            if tokens > MANY_BATCHES * self.parts.settings.token_budget:
                reason = f"{count} of your operations, {tokens:,} tokens, wait for their turn"
                return Waiting("paused_capacity", reason)
        return await self.missing.explain(tenant, request_id) if outcome is None else outcome

    # -- inside ---------------------------------------------------

    async def _submit(
        self, tenant: str, kind: str, request: Numbered, digest: str | None = None
    ) -> Submitted:
        return await self.models.submit(
            tenant, request.model_id, request.seq_id, OperationRequest(kind, request),
            request.model_dump_json().encode(), digest or digest_json(request),
        )  # fmt: skip

    def _new_row(
        self,
        tenant: str,
        id: str,
        request: CreateModelRequest | LoadWeightsRequest,
        base_model: str,
        spec: dict[str, object],
        digest: str,
        source_path: str | None = None,
    ) -> ModelRow:
        now = time.time()
        assert request.session_id is not None and request.model_seq_id is not None
        return ModelRow(
            id=id, tenant=tenant, session_id=request.session_id,
            model_seq_id=request.model_seq_id, base_model=base_model, spec=spec, digest=digest,
            created_at=now, last_request_at=now, user_metadata=dict(request.user_metadata or {}),
            source_path=source_path,
        )  # fmt: skip

    async def _add(self, row: ModelRow) -> bool:
        """Make a model's row durable and open it; False if it had been made before.

        Raises:
            QuotaExceeded: the tenant has all that it may have. Conflict: the number is taken.
        """
        if not self.models.is_open(row.id):
            self.check_adapters(row.tenant)
        kept = await asyncio.to_thread(self.parts.store.models.create, row)
        if self.models.is_open(row.id) or kept.closed_at is not None:
            return False
        self.models.add(kept)
        promise = self.parts.promises.open(_creation_of(row.id), row.tenant, row.digest)
        promise.durable.set_result(None)
        return True


def _model_id(session_id: str, seq: int) -> str:
    """The id that the SDK works out for itself when a model is made by a load."""
    return f"{session_id}:train:{seq}"


def _creation_of(model_id: str) -> str:
    return f"{model_id}:{CREATION}"


def _json(reply: Reply) -> tuple[str, bytes]:
    return JSON_TYPE, reply.model_dump_json(exclude_none=True).encode()
