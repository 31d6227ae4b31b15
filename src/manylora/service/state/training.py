"""Clients make and train adapters: each request is durable before it is answered."""

import asyncio
import time
from collections.abc import Callable

from manylora.hosting import Pager
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.open_adapters import OpenAdapters, seed_of
from manylora.service.state.resources import Resources
from manylora.service.state.samplers import Samplers
from manylora.service.state.sessions import Sessions
from manylora.service.state.submitted_runs import SubmittedRuns
from manylora.service.state.wire_operations import Load, OperationRequest, adapter_spec, json_result
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
from manylora.service.wire.replies import CreateModelReply, LoadWeightsReply, Submitted
from manylora.store import ModelRow
from manylora.types import DataError, ManyloraError

# The number of the request that makes an adapter; its client's own numbers begin after it.
CREATION = 0


class Training:
    """`Training` takes requests that make adapters, or are numbered; see `contract.TrainingApi`."""

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
        adapter = adapter_spec(spec, self._resources.host.engine.sites)
        row = _new_row(tenant, slot, request, request.base_model, spec)
        return await self._open(row, lambda pager: pager.create(row.id, adapter))

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
        spec, id, called = dict(checkpoint.spec), target.model_id, str(path)
        host, folder = self._resources.host, self._checkpoints.folder_of(checkpoint)
        adapter = adapter_spec(spec, host.engine.sites)
        async with self._loading:
            # A load is a copy of files, made before it is acknowledged: from here on the adapter
            # does not depend on the checkpoint.
            if not self._adapters.is_open(id):
                await asyncio.to_thread(
                    host.adopt, id, folder, spec=adapter, moments=request.optimizer, called=called
                )
            base = request.base_model or str(spec["base_model"])
            row = _new_row(tenant, target, request, base, spec, called)
            return await self._open(row, lambda pager: pager.register(id, adapter, 0))

    async def _open(self, row: ModelRow, make: Callable[[Pager], object]) -> Submitted:
        """Make an adapter's row durable and open it, unless it had been made before. Raises
        QuotaExceeded: the tenant has all that it may have; Conflict: the number is taken."""
        if not self._adapters.is_open(row.id):
            self._runs.check_room(row.tenant)
        request_id, promises = creation_of(row.id), self._resources.promises
        kept = await asyncio.to_thread(self._resources.store.models.create, row)
        if not self._adapters.is_open(row.id) and kept.closed_at is None:
            self._adapters.add(kept)
            promises.open(request_id, row.tenant, row.digest).durable.set_result(None)
            made = self._resources.host.call(row.id, make, tenant=row.tenant)
            promises.follow(request_id, made, lambda _: created(row))
        return Submitted(request_id=request_id, model_id=row.id)

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
        operation = OperationRequest(KIND_OF_MESSAGE[type(request)], request)
        body = request.model_dump_json().encode()
        return await self._adapters.submit(tenant, *request.place, operation, body, digest)

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
    """Return the id of the request that made an adapter."""
    return f"{model_id}:{CREATION}"


def created(row: ModelRow) -> tuple[str, bytes]:
    """Return the result of the request that made an adapter."""
    if row.source_path is None:
        return json_result(CreateModelReply(model_id=row.id))
    return json_result(LoadWeightsReply(model_id=row.id, path=row.source_path))


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
