"""The engine's verbs: one base, many adapters, one packed batch.

P parameters of an adapter, T tokens of a stream, H hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from manylora.engine.decoding import Decoder
from manylora.engine.head_loss import HeadLoss
from manylora.engine.host_memory import keep_freed_memory
from manylora.engine.microbatch import MicroBatch, build
from manylora.engine.plan import cut, pack
from manylora.engine.results import Rows, results
from manylora.lora.adapter import (
    TORCH_DTYPES,
    Adapter,
    AdapterWeights,
    SiteIndex,
    to_array,
    to_tensor,
)
from manylora.lora.init import fresh_state
from manylora.lora.layout import plan_layout
from manylora.lora.linear import wrap_linears
from manylora.lora.routing import RoutingTable, routing
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState, Floats
from manylora.losses import Loss, Settings, get_loss
from manylora.models import BaseModel, PackedStream, open_base, packed
from manylora.models.base import checkpoint_activations
from manylora.models.linears import find_linears
from manylora.optim import adamw_step, clip_, gradient_norms
from manylora.sampling import DecodeLoop
from manylora.types import (
    AdapterExists,
    AdapterNotFound,
    AdapterSpec,
    DataError,
    Datum,
    DatumTooLong,
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    NotFinite,
    OptimStep,
    OptimStepResult,
    Sample,
    SampleResult,
    StepRefused,
)

Result = TypeVar("Result")


class Engine:
    """A base model and the adapters on it. One thread at a time; errors come back as values.

    The verbs that take several operations return, for each, its result or the typed error that
    concerns its adapter alone.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        token_budget: int = 4096,
        dtype: str = "auto",
        device: str = "auto",
        activation_checkpointing: bool = False,
    ):
        """Open the base.

        Args:
            base: `seedling`, a folder, or a hub id.
            token_budget: tokens of one micro-batch; a longer datum runs alone.
            dtype, device: see `manylora.models.open_base`.
            activation_checkpointing: recompute each block in the backward.

        Raises:
            BaseModelError, Unsupported: see `manylora.models.open_base`.
        """
        self.base: BaseModel = open_base(base, dtype=dtype, device=device)
        if self.base.device.type == "cpu":
            keep_freed_memory()
        self.token_budget = token_budget
        linears = find_linears(self.base)
        self.sites = tuple(
            Site(
                found.name,
                found.layer.in_features,
                found.layer.out_features,
                found.group,
                found.is_head,
            )
            for found in linears
        )
        self.index = SiteIndex(self.sites)
        wrap_linears(self.base.model, self.index)
        if activation_checkpointing:
            checkpoint_activations(self.base)
        self.head_loss = HeadLoss(self.base.head, self.sites[-1].group)
        self.adapters: dict[str, Adapter] = {}
        self.snapshots: dict[str, AdapterWeights] = {}
        loop = DecodeLoop(self.base, token_budget=token_budget)
        self.decoder = Decoder(self.base, loop, self._sampled_weights)

    # -- adapters -------------------------------------------------------------------------------

    def create(self, name: str, spec: AdapterSpec) -> Adapter:
        """A new adapter that changes nothing yet.

        Raises:
            AdapterExists, TargetError
        """
        layout = plan_layout(spec, resolve_targets(spec, self.sites))
        return self.restore(name, fresh_state(spec, layout))

    def restore(self, name: str, state: AdapterState) -> Adapter:
        """An adapter with the given state, whose layout must be this base's.

        Raises:
            AdapterExists
        """
        if name in self.adapters:
            raise AdapterExists(f"an adapter named {name!r} exists already; choose another name")
        self.adapters[name] = Adapter(state, self.index, self.base.device)
        return self.adapters[name]

    def base_weight(self, site: str) -> Floats:
        """A copy of the frozen weight [N, K] of a linear layer, in fp32."""
        weight = self.base.model.get_submodule(site).weight
        assert isinstance(weight, Tensor)
        return to_array(weight)

    def unload(self, name: str) -> None:
        """Forget an adapter; its snapshots stay."""
        self._adapter(name)
        del self.adapters[name]

    def poison(self, name: str, reason: str) -> None:
        """Have the adapter's next optimizer step refused, as after a failed forward_backward."""
        adapter = self._adapter(name)
        if adapter.poison is None:
            adapter.poison = reason

    def state(self, name: str) -> AdapterState:
        """A detached copy of everything that training the adapter needs."""
        return self._adapter(name).state()

    def snapshot(self, name: str, snapshot: str) -> None:
        """Freeze a copy of the adapter's weights under the name `snapshot`."""
        self.snapshots[snapshot] = self._adapter(name).weights.snapshot(self.index)

    def snapshot_state(self, snapshot: str) -> AdapterState:
        """A snapshot as a state (fp32), for keeping it elsewhere."""
        weights = self.snapshots[snapshot]
        return AdapterState(weights.spec, weights.layout, to_array(weights.weights_P))

    def install_snapshot(self, snapshot: str, state: AdapterState) -> None:
        """Bring a snapshot back that `snapshot_state` gave."""
        dtype = TORCH_DTYPES[state.spec.dtype]
        weights_P = to_tensor(state.weights, self.base.device, dtype)
        self.snapshots[snapshot] = AdapterWeights(state.spec, state.layout, weights_P, self.index)

    def drop_snapshot(self, snapshot: str) -> None:
        """Forget a snapshot."""
        self.snapshots.pop(snapshot, None)

    # -- training -------------------------------------------------------------------------------

    def forward_backward(
        self, works: Sequence[ForwardBackward]
    ) -> list[ForwardBackwardResult | ManyloraError]:
        """Run the work of any number of adapters, merged into micro-batches.

        Returns:
            For each operation its result, or: DataError, DatumTooLong, AdapterNotFound,
            NotFinite. After an error the adapter's pending gradients are refused by its next
            optimizer step; after an exception, those of every adapter of the call.
        """
        outcomes: list[ForwardBackwardResult | ManyloraError | None] = [None] * len(works)
        losses: list[tuple[Loss, Settings] | None] = [None] * len(works)
        for number, work in enumerate(works):
            try:
                losses[number] = self._check(work)
            except ManyloraError as error:
                outcomes[number] = error
                self._poison(work, error)
        try:
            for backward in (True, False):
                self._run_all(works, losses, outcomes, backward=backward)
        except Exception as error:
            # Some micro-batches may have added their gradients already.
            for work in works:
                self._poison(work, error)
            raise
        return outcomes  # type: ignore[return-value]

    def optim_step(self, steps: Sequence[OptimStep]) -> list[OptimStepResult | ManyloraError]:
        """Step the adapters that are due; each by its own norm, clip and hyper-parameters.

        Returns:
            For each its result, or: StepRefused, NotFinite (weights and moments unchanged, the
            gradient dropped), AdapterNotFound.
        """
        outcomes: list[OptimStepResult | ManyloraError | None] = [None] * len(steps)
        due: list[tuple[int, OptimStep, Adapter]] = []
        for number, step in enumerate(steps):
            adapter = self.adapters.get(step.adapter)
            if adapter is None:
                outcomes[number] = self._missing(step.adapter)
            elif adapter.poison is not None:
                outcomes[number] = StepRefused(
                    f"adapter {step.adapter!r}: gradients of this step were dropped: "
                    f"{adapter.poison}"
                )
                adapter.drop_grad()
            else:
                due.append((number, step, adapter))
        norms = gradient_norms([adapter.require_grad() for *_, adapter in due]) if due else []
        for (number, step, adapter), norm in zip(due, norms, strict=True):
            outcomes[number] = _step(step, adapter, norm)
        return outcomes  # type: ignore[return-value]

    # -- sampling -------------------------------------------------------------------------------

    @property
    def decoding(self) -> int:
        """Sampling requests that are not finished."""
        return self.decoder.decoding

    def admit(self, samples: Sequence[Sample]) -> list[ManyloraError | None]:
        """Let sampling requests join the decode loop; see `Decoder.admit`.

        A request without a snapshot reads its adapter's living weights: until it is finished, no
        other verb may change them.
        """
        return self.decoder.admit(samples)

    def decode(self, seconds: float) -> list[tuple[Sample, SampleResult | ManyloraError]]:
        """Turn the decode loop for a while; see `Decoder.decode`."""
        return self.decoder.decode(seconds)

    def cancel(self, sample: Sample) -> None:
        """Drop a sampling request, if it is still decoding."""
        self.decoder.cancel(sample)

    def sample(self, requests: Sequence[Sample]) -> list[SampleResult | ManyloraError]:
        """Admit requests and decode until all are finished; for callers without a scheduler."""
        return self.decoder.sample(requests)

    # -- inside ---------------------------------------------------------------------------------

    def _run_all(
        self,
        works: Sequence[ForwardBackward],
        losses: Sequence[tuple[Loss, Settings] | None],
        outcomes: list[ForwardBackwardResult | ManyloraError | None],
        *,
        backward: bool,
    ) -> None:
        """Run the sound operations of one kind; their outcomes are filled in."""
        runnable = [
            (number, work)
            for number, work in enumerate(works)
            if losses[number] is not None and work.backward == backward
        ]
        pieces = [p for number, work in runnable for p in cut(number, work, self.token_budget)]
        rows = [
            self._run(
                build(batch, self.adapters, losses, backward=backward, device=self.base.device),  # type: ignore[arg-type]
                backward=backward,
            )
            for batch in pack(pieces, self.token_budget)
        ]
        for number, result in results(rows, runnable):
            outcomes[number] = self._finite(works[number], result)

    def _run(self, batch: MicroBatch, *, backward: bool) -> Rows:
        """Forward, loss and backward of one micro-batch."""
        table = RoutingTable(batch.segments, training=backward)
        stream = PackedStream(batch.lengths, batch.total)
        with torch.set_grad_enabled(backward), routing(table), packed(stream):
            hidden_TH = self.base.hidden(batch.tokens_T, batch.positions_T)
            out = self.head_loss(hidden_TH.detach(), batch, table, backward=backward)
            # Nothing to do below the head if only the head carries adapters.
            if out.grad_TH is not None and hidden_TH.requires_grad:
                hidden_TH.backward(out.grad_TH)
            out.grad_TH = None  # the rest is kept until all micro-batches have been started
        for piece in batch.pieces:
            if backward:
                self.adapters[piece.adapter].has_grad = True
        return Rows(batch, out)

    def _check(self, work: ForwardBackward) -> tuple[Loss, Settings]:
        self._adapter(work.adapter)
        where = f"adapter {work.adapter!r}"
        try:
            loss = get_loss(work.loss)
            settings = loss.settings(work.config)
            for number, datum in enumerate(work.data):
                where = f"adapter {work.adapter!r}, datum {number}"
                loss.check(datum)
                self._check_tokens(datum)
        except DataError as error:
            raise type(error)(f"{where}: {error}") from error
        return loss, settings

    def _check_tokens(self, datum: Datum) -> None:
        if len(datum) > self.base.context_length:
            raise DatumTooLong(
                f"{len(datum)} tokens; the context of base {self.base.name!r} is "
                f"{self.base.context_length}: shorten or split it"
            )
        for name, tokens in (
            ("tokens", datum.tokens),
            ("target_tokens", datum.loss_inputs["target_tokens"]),
        ):
            if tokens.min() < 0 or tokens.max() >= self.base.vocab_size:
                stray = tokens[(tokens < 0) | (tokens >= self.base.vocab_size)].flat[0]
                raise DataError(
                    f"{name} holds {stray}; token ids are 0 … {self.base.vocab_size - 1}"
                )

    def _poison(self, work: ForwardBackward, error: Exception) -> None:
        adapter = self.adapters.get(work.adapter)
        if adapter is not None and work.backward and adapter.poison is None:
            adapter.poison = str(error)

    def _finite(
        self, work: ForwardBackward, result: ForwardBackwardResult
    ) -> ForwardBackwardResult | ManyloraError:
        if np.isfinite(result.loss):
            return result
        error = NotFinite(
            f"adapter {work.adapter!r}: the loss is {result.loss}; lower the learning rate or look "
            "at the data of this step"
        )
        self._poison(work, error)
        return error

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise self._missing(name)
        return self.adapters[name]

    def _missing(self, name: str) -> AdapterNotFound:
        return AdapterNotFound(f"no adapter named {name!r}; there are: {sorted(self.adapters)}")

    def _sampled_weights(self, request: Sample) -> AdapterWeights | None:
        if request.snapshot is not None:
            if request.snapshot not in self.snapshots:
                raise AdapterNotFound(f"no snapshot named {request.snapshot!r}")
            return self.snapshots[request.snapshot]
        return None if request.adapter is None else self._adapter(request.adapter).weights


def _step(step: OptimStep, adapter: Adapter, norm: float) -> OptimStepResult | ManyloraError:
    if not np.isfinite(norm):
        adapter.drop_grad()
        return NotFinite(
            f"adapter {step.adapter!r}: the gradient's norm is {norm}; weights and moments are "
            "unchanged. Lower the learning rate or look at the data of this step"
        )
    grad_P = adapter.require_grad()
    clip_(grad_P, norm, step.params.clip_norm)
    adamw_step(adapter.master_P, grad_P, *adapter.require_moments(), adapter.step, step.params)
    adapter.step += 1
    adapter.publish()
    adapter.drop_grad()
    return OptimStepResult(adapter.step, norm)
