"""Each operation of a model goes from a wire request to the engine and back to bytes."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from manylora.hosting import Pager
from manylora.hosting.futures import flattened
from manylora.lora.sites import Site, resolve_targets
from manylora.service.contract import JSON_TYPE, PROTOBUF_TYPE
from manylora.service.state.checkpoints import CheckpointOrder, Checkpoints
from manylora.service.state.promises import Encode
from manylora.service.state.resources import HeldRequest, Resources
from manylora.service.wire import codec
from manylora.service.wire.messages import (
    LoadWeightsRequest,
    OperationKind,
    OptimStepRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
    WireAdamParams,
)
from manylora.service.wire.paths import PathKind, TinkerPath
from manylora.service.wire.pieces import ForwardBackwardSubmit
from manylora.service.wire.replies import (
    LoadWeightsReply,
    OptimStepReply,
    Reply,
    SaveWeightsExternalReply,
    SaveWeightsForSamplerReply,
    SaveWeightsReply,
)
from manylora.store import CheckpointRow, ModelRow
from manylora.types import (
    AdapterSpec,
    DataError,
    ForwardBackward,
    ManyloraError,
    OptimStep,
    OptimStepResult,
)

# An operation that the queue has: its result to come, and how that is encoded.
Queued = tuple[Future[Any], Encode]
# LoRA's alpha is not on the wire; the hosted service and its recipes use 32.
ALPHA = 32.0


@dataclass(frozen=True, slots=True)
class OperationRequest:
    """An `OperationRequest` is one operation as it waits for its turn.

    Attributes:
        kind: what the server knows of such operations.
        content: the decoded request, or the outline of one that is not decoded yet; for
            `REFUSED`, the error.
        tokens, body_bytes, decoded_bytes: see `HeldRequest`.
    """

    kind: OperationKind
    content: Any
    tokens: int = 0
    body_bytes: int = 0
    decoded_bytes: int = 0

    def held_by(self, tenant: str) -> HeldRequest:
        """Return what it is counted as."""
        return HeldRequest(tenant, self.tokens, self.body_bytes, self.decoded_bytes)

    @property
    def leaves_no_trace(self) -> bool:
        """It leaves the adapter as it was."""
        return self.kind.leaves_no_trace(self.content)


class Load(NamedTuple):
    """A `Load` goes into an adapter that is there: the request, and the checkpoint it names."""

    request: LoadWeightsRequest
    checkpoint: CheckpointRow


class Operations:
    """`Operations` say what the operations of each kind do."""

    def __init__(
        self, resources: Resources, checkpoints: Checkpoints, published: Callable[[str, str], None]
    ):
        """Tell `published` the model and the snapshot of each new `inflight` target."""
        self._resources = resources
        self._checkpoints = checkpoints
        self._published = published

    def run(self, row: ModelRow, seq: int, request: OperationRequest, *, replayed: bool) -> Queued:
        """Hand an operation to the queue. If it is `replayed`, it may have run before a restart:
        one that leaves the adapter as it was, and whose result is there, is passed over."""
        request_id = f"{row.id}:{seq}"
        if replayed and request.leaves_no_trace:
            result = self._resources.promises.results.get(request_id)
            if result is not None:
                skipped = self._call(row, seq, lambda pager: pager.skip(row.id, seq))
                return skipped, lambda _: (result.content_type, result.body)
        try:
            return self._handed_over(row, seq, request.content)
        except ManyloraError as error:
            return self._refused(row, seq, error)

    def _handed_over(self, row: ModelRow, seq: int, content: object) -> Queued:
        match content:
            case ForwardBackwardSubmit():
                return self._forward_backward(row, seq, content)
            case OptimStepRequest(adam_params=WireAdamParams() as adam):
                return self._optim_step(row, seq, adam)
            case SaveWeightsRequest():
                return self._save_weights(row, seq, content)
            case SaveWeightsForSamplerRequest():
                return self._save_weights_for_sampler(row, seq, content)
            case SaveWeightsExternalRequest():
                return self._save_weights_external(row, seq, content)
            case Load():
                return self._load_weights(row, seq, content)
            case ManyloraError():
                return self._refused(row, seq, content)
        raise TypeError(f"nothing is known of an operation with {type(content).__name__}")

    def is_known(self, request_id: str) -> bool:
        """Return whether a request has a result."""
        return self._resources.promises.results.get(request_id) is not None

    # -- training ---------------------------------------------------

    def _forward_backward(self, row: ModelRow, seq: int, submit: ForwardBackwardSubmit) -> Queued:
        work = ForwardBackward(
            adapter=row.id, data=submit.data, loss=submit.loss, config=submit.config,
            backward=not submit.forward_only, tenant=row.tenant, seq=seq,
        )  # fmt: skip
        future = self._resources.host.submit(work)
        return future, lambda result: (PROTOBUF_TYPE, codec.encode_forward_backward(result))

    def _optim_step(self, row: ModelRow, seq: int, adam: WireAdamParams) -> Queued:
        params = codec.adam_params(adam)
        step = OptimStep(adapter=row.id, params=params, tenant=row.tenant, seq=seq)

        def encode(result: OptimStepResult) -> tuple[str, bytes]:
            # Recipes write these beside their own `step`, and go by that when they resume.
            return json_result(
                OptimStepReply(metrics={"optim/step": result.step, "grad_norm": result.grad_norm})
            )

        return self._resources.host.submit(step), encode

    def _refused(self, row: ModelRow, seq: int, error: ManyloraError) -> Queued:
        def run(pager: Pager) -> None:
            with suppress(ManyloraError):  # an adapter that cannot be brought back has no gradient
                pager.poison(row.id, str(error), seq)
            raise error

        return self._call(row, seq, run), lambda _: json_result(Reply())

    # -- saving and loading ---------------------------------------------------

    def _save_weights(self, row: ModelRow, seq: int, request: SaveWeightsRequest) -> Queued:
        name = request.path or f"seq-{seq:06d}"
        order = self._order(row, seq, "weights", name, request.ttl_seconds)
        order = replace(order, overwrite=request.overwrite, user_metadata=request.user_metadata)
        return self._keep(row, order), lambda kept: json_result(SaveWeightsReply(path=kept.path))

    def _save_weights_for_sampler(
        self, row: ModelRow, seq: int, request: SaveWeightsForSamplerRequest
    ) -> Queued:
        if request.path is not None:
            order = self._order(row, seq, "sampler_weights", request.path, request.ttl_seconds)
            future = self._keep(row, replace(order, user_metadata=request.user_metadata))
            return future, lambda kept: json_result(SaveWeightsForSamplerReply(path=kept.path))
        sampler = sampler_id(row.session_id, request.sampling_session_seq_id or 0)
        future = self._resources.host.snapshot(row.id, sampler, tenant=row.tenant, seq=seq)

        def encode(_: None) -> tuple[str, bytes]:
            if request.kind == "inflight":
                self._published(row.id, sampler)
            return json_result(SaveWeightsForSamplerReply(sampling_session_id=sampler))

        return future, encode

    def _save_weights_external(
        self, row: ModelRow, seq: int, request: SaveWeightsExternalRequest
    ) -> Queued:
        order = self._order(row, seq, "external_weights", request.path, request.ttl_seconds)

        def encode(kept: CheckpointRow) -> tuple[str, bytes]:
            return json_result(SaveWeightsExternalReply(path=kept.path, size_bytes=kept.size_bytes))

        return self._keep(row, order), encode

    def _load_weights(self, row: ModelRow, seq: int, load: Load) -> Queued:
        asked, checkpoint = load
        if seq != 1:
            raise DataError(
                "load_weights replaces a model that has done nothing yet; to go on from a "
                "checkpoint, create a training client from it"
            )
        folder, host = self._checkpoints.folder_of(checkpoint), self._resources.host
        spec = adapter_spec(row.spec, host.engine.sites)
        # A seed has had its effect when an adapter is made; this one keeps its own.
        theirs = replace(spec, seed=int(checkpoint.spec["seed"]))

        def run(pager: Pager) -> None:
            state = host.read(folder, spec=theirs, moments=asked.optimizer, called=asked.path)
            pager.replace(row.id, replace(state, spec=spec), seq)

        reply = LoadWeightsReply(model_id=row.id, path=asked.path)
        return self._call(row, seq, run), lambda _: json_result(reply)

    def keep_last(self, row: ModelRow) -> Future[CheckpointRow]:
        """Save the adapter's state after everything that was handed over, as checkpoint `last`."""
        request_id = f"{row.id}:last"

        def run(pager: Pager) -> Future[CheckpointRow]:
            order = self._order(row, pager.position(row.id), "weights", "last")
            return self._write(pager, replace(order, request_id=request_id, overwrite=True))

        return flattened(self._resources.host.call(row.id, run, tenant=row.tenant))

    # -- inside ---------------------------------------------------

    def _call(self, row: ModelRow, seq: int, run: Callable[[Pager], Any]) -> Future[Any]:
        return self._resources.host.call(row.id, run, tenant=row.tenant, seq=seq)

    def _keep(self, row: ModelRow, order: CheckpointOrder) -> Future[CheckpointRow]:
        """Copy the adapter's state in its turn; write it while others go on."""
        return flattened(self._call(row, order.seq, lambda pager: self._write(pager, order)))

    def _write(self, pager: Pager, order: CheckpointOrder) -> Future[CheckpointRow]:
        host, kind = self._resources.host, order.path.kind
        state = pager.state(order.path.model_id, order.seq, moments=kind == "weights")
        return pager.write(lambda: self._checkpoints.write(host, order, state), state)

    def _order(
        self, row: ModelRow, seq: int, kind: PathKind, name: str, ttl_seconds: int | None = None
    ) -> CheckpointOrder:
        return CheckpointOrder(
            path=TinkerPath(row.id, kind, name),
            tenant=row.tenant,
            request_id=f"{row.id}:{seq}",
            seq=seq,
            spec=row.spec,
            ttl_seconds=ttl_seconds,
        )


def sampler_id(session_id: str, seq: int) -> str:
    """Return the id that the SDK expects of a session's sampler."""
    return f"{session_id}:sample:{seq}"


def snapshot_made_by(row: ModelRow, request: OperationRequest) -> str | None:
    """Return the snapshot that an operation makes, if it makes one."""
    number = request.kind.sampler(request.content)
    return None if number is None else sampler_id(row.session_id, number)


def adapter_spec(spec: Mapping[str, Any], sites: Sequence[Site]) -> AdapterSpec:
    """Return the adapter that a model's row describes, on the linear layers of the base. Raises
    DataError: nothing is left to train."""
    if "adapter" in spec:
        whole = dict(spec["adapter"])
        if isinstance(whole["targets"], list):
            whole["targets"] = tuple(whole["targets"])
        return AdapterSpec(**whole)
    wanted = {kind for kind in ("attn", "mlp", "unembed") if spec[f"train_{kind}"]}
    leaves = {site.name.rpartition(".")[2] for site in sites if _kind_of(site) in wanted}
    if not leaves:
        raise DataError(
            "train_attn, train_mlp and train_unembed leave nothing to train; set one of them"
        )
    return AdapterSpec(
        rank=int(spec["rank"]), alpha=ALPHA, targets=tuple(sorted(leaves)), seed=int(spec["seed"])
    )


def row_spec(adapter: AdapterSpec, base_model: str, sites: Sequence[Site]) -> dict[str, Any]:
    """Return a row's words for an adapter that the wire's own words cannot describe."""
    kinds = {_kind_of(target.site) for target in resolve_targets(adapter, sites)}
    return {
        "rank": adapter.rank,
        "seed": adapter.seed,
        **{f"train_{kind}": kind in kinds for kind in ("attn", "mlp", "unembed")},
        "base_model": base_model,
        "adapter": asdict(adapter),
    }


def _kind_of(site: Site) -> str:
    if site.is_head:
        return "unembed"
    path = site.name.lower()
    return "attn" if "attn" in path or "attention" in path else "mlp"


def json_result(reply: Reply) -> tuple[str, bytes]:
    """Return a result as it is stored: content type and body."""
    return JSON_TYPE, reply.model_dump_json(exclude_none=True).encode()
