"""Adapters as clients make and train them: each request is durable before it is answered."""

import asyncio
import time

from manylora.service.contract import JSON_TYPE
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.open_adapters import OpenAdapters, seed_of
from manylora.service.state.resources import Resources
from manylora.service.state.samplers import Samplers
from manylora.service.state.sessions import Sessions
from manylora.service.state.submitted_runs import SubmittedRuns
from manylora.service.state.wire_operations import Load, OperationRequest, adapter_spec
from manylora.service.wire.codec import digest_json
from manylora.service.wire.messages import (
    KIND_OF_MESSAGE,
    KINDS,
    CreateModelRequest,
    LoadWeightsRequest,
    LoraConfig,
    Numbered,
    SaveWeightsForSamplerRequest,
    Slot,
)
from manylora.service.wire.outline import Outline
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.replies import CreateModelReply, LoadWeightsReply, Reply, Submitted
from manylora.store import CheckpointRow, ModelRow
from manylora.types import DataError, ManyloraError

# The number of the request that makes an adapter; its client's own numbers begin after it.
CREATION = 0


class Training:
    """The requests that make adapters, and those that are numbered; see `contract.TrainingApi`."""

    def __init__(
        self,
        resources: Resources,
        sessions: Sessions,
        checkpoints: Checkpoints,
        samplers: Samplers,
        adapters: OpenAdapters,
        runs: SubmittedRuns,
    ):
        self._resources = resources
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._samplers = samplers
        self._adapters = adapters
        self._runs = runs
        # A copy must not replace what an adapter has learned since an equal request made it.
        self._loading = asyncio.Lock()

    # -- making adapters ---------------------------------------------------

    async def create_model(
        self, tenant: str, request: CreateModelRequest, lora: LoraConfig
    ) -> Submitted:
        await self._sessions.require(tenant, request.session_id)
        self._resources.check_base(request.base_model)
        limit = self._resources.settings.limits.rank
        if lora.rank > limit:
            raise DataError(f"lora_config.rank is {lora.rank}; at most {limit} here")
        slot = Slot(request.session_id, request.model_seq_id)
        spec: dict[str, object] = {
            "rank": lora.rank,
            "seed": seed_of(slot.model_id) if lora.seed is None else lora.seed,
            "train_attn": lora.train_attn,
            "train_mlp": lora.train_mlp,
            "train_unembed": lora.train_unembed,
            "base_model": request.base_model,
        }
        host, id = self._resources.host, slot.model_id
        adapter = adapter_spec(spec, host.engine.sites)
        row = _new_row(tenant, slot, request, request.base_model, spec)
        if await self._add(row):
            made = host.call(id, lambda pager: pager.create(id, adapter), tenant=tenant)
            reply = CreateModelReply(model_id=id)
            self._resources.promises.follow(creation_of(id), made, lambda _: _json(reply))
        return Submitted(request_id=creation_of(id), model_id=id)

    async def load_weights(
        self, tenant: str, request: LoadWeightsRequest, path: TinkerPath
    ) -> Submitted:
        checkpoint = await self._checkpoints.readable(tenant, path, "weights")
        target = request.target
        if not isinstance(target, Slot):
            load = OperationRequest(KINDS["load_weights"], Load(request, checkpoint))
            body, digest = request.model_dump_json().encode(), digest_json(request)
            return await self._adapters.submit(tenant, *target, load, body, digest)
        await self._sessions.require(tenant, target.session_id)
        if request.base_model is not None:
            self._resources.check_base(request.base_model)
        async with self._loading:
            return await self._create_from(tenant, target, request, path, checkpoint)

    async def _create_from(
        self,
        tenant: str,
        slot: Slot,
        request: LoadWeightsRequest,
        path: TinkerPath,
        checkpoint: CheckpointRow,
    ) -> Submitted:
        """A new adapter that begins with a checkpoint. A load is a copy of files, made before it is
        acknowledged: from here on the adapter does not depend on the checkpoint."""
        spec, id = dict(checkpoint.spec), slot.model_id
        host, folder = self._resources.host, self._checkpoints.folder_of(checkpoint)
        adapter = adapter_spec(spec, host.engine.sites)
        if not self._adapters.is_open(id):
            await asyncio.to_thread(
                host.adopt, id, folder, spec=adapter, moments=request.optimizer, called=str(path)
            )
        base = request.base_model or str(spec["base_model"])
        row = _new_row(tenant, slot, request, base, spec, str(path))
        if await self._add(row):
            registered = host.call(id, lambda pager: pager.register(id, adapter, 0), tenant=tenant)
            reply = LoadWeightsReply(model_id=id, path=str(path))
            self._resources.promises.follow(creation_of(id), registered, lambda _: _json(reply))
        return Submitted(request_id=creation_of(id), model_id=id)

    async def _add(self, row: ModelRow) -> bool:
        """Make an adapter's row durable and open it; False if it had been made before.

        Raises:
            QuotaExceeded: the tenant has all that it may have.
            Conflict: the number is taken.
        """
        if not self._adapters.is_open(row.id):
            self._runs.check_room(row.tenant)
        kept = await asyncio.to_thread(self._resources.store.models.create, row)
        if self._adapters.is_open(row.id) or kept.closed_at is not None:
            return False
        self._adapters.add(kept)
        promise = self._resources.promises.open(creation_of(row.id), row.tenant, row.digest)
        promise.durable.set_result(None)
        return True

    # -- operations ---------------------------------------------------

    async def forward_backward(self, tenant: str, outline: Outline) -> Submitted:
        request = OperationRequest(KINDS["forward_backward"], outline, outline.num_tokens)
        return await self._adapters.submit(
            tenant, outline.model_id, outline.seq_id, request, outline.body, outline.digest
        )

    async def submit(self, tenant: str, request: Numbered) -> Submitted:
        digest = digest_json(request)
        if isinstance(request, SaveWeightsForSamplerRequest):
            # A retry of an ephemeral save comes with another number for its sampler.
            digest = digest_json(request.model_copy(update={"sampling_session_seq_id": 0}))
            await self._expect_sampler(tenant, request, digest)
        return await self._adapters.submit(
            tenant,
            *request.place,
            OperationRequest(KIND_OF_MESSAGE[type(request)], request),
            request.model_dump_json().encode(),
            digest,
        )

    async def _expect_sampler(
        self, tenant: str, request: SaveWeightsForSamplerRequest, digest: str
    ) -> None:
        """Make the sampling session of an ephemeral save, unless the save is repeated."""
        number = request.sampling_session_seq_id
        if number is None:
            return
        adapter = await self._adapters.require(tenant, request.model_id)
        if not adapter.order.is_repeated(request.seq_id, digest):
            await self._samplers.of_adapter(adapter.row, number, request.kind)

    async def refuse(self, tenant: str, model_id: str, seq_id: int, error: ManyloraError) -> None:
        await self._adapters.refuse(tenant, model_id, seq_id, error)


def creation_of(model_id: str) -> str:
    """The id of the request that made an adapter."""
    return f"{model_id}:{CREATION}"


def _new_row(
    tenant: str,
    slot: Slot,
    request: CreateModelRequest | LoadWeightsRequest,
    base_model: str,
    spec: dict[str, object],
    source_path: str | None = None,
) -> ModelRow:
    now = time.time()
    return ModelRow(
        id=slot.model_id,
        tenant=tenant,
        session_id=slot.session_id,
        model_seq_id=slot.number,
        base_model=base_model,
        spec=spec,
        digest=digest_json(request),
        created_at=now,
        last_request_at=now,
        user_metadata=dict(request.user_metadata or {}),
        source_path=source_path,
    )


def _json(reply: Reply) -> tuple[str, bytes]:
    return JSON_TYPE, reply.model_dump_json(exclude_none=True).encode()
