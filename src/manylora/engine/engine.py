"""The engine's verbs act on one base and many adapters, in packed batches.

P parameters of an adapter, T tokens of a packed batch, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from manylora.engine.admission import admit_work, cached_tokens
from manylora.engine.checking import check
from manylora.engine.decoding import Decoder
from manylora.engine.head_loss import HeadLoss
from manylora.engine.host_memory import FreeMemory, keep_freed_memory
from manylora.engine.microbatch import MicroBatch, build
from manylora.engine.plan import Plan, make_plan, whose
from manylora.engine.results import Losses, Rows, found, gathered, results
from manylora.engine.stepping import Due, step_on_mesh
from manylora.kernels import DTYPES, settle_functions, whole_products
from manylora.lora.adapter import Adapter, AdapterWeights, SiteIndex, to_array, to_tensor
from manylora.lora.gathering import gathered_state, gathered_weights
from manylora.lora.init import fresh_state, named_seed
from manylora.lora.layout import Layout, plan_layout
from manylora.lora.linear import site_of, wrap_linears
from manylora.lora.routing import RoutingTable, routing
from manylora.lora.sharding import part_of, place_on
from manylora.lora.sites import resolve_targets
from manylora.lora.state import AdapterState, Floats
from manylora.losses import Loss, Settings
from manylora.models import BaseModel, PackedStream, open_base, packed
from manylora.models.base import checkpoint_activations
from manylora.models.linears import find_linears
from manylora.models.whole import whole_weight
from manylora.parallel import Mesh
from manylora.sampling import DecodeLoop
from manylora.sampling.loop import MAX_CACHED_TOKENS
from manylora.sampling.step_rows import kept_twice_bytes
from manylora.types import (
    AdapterExists,
    AdapterNotFound,
    AdapterSpec,
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    NotFinite,
    Opening,
    OptimStep,
    OptimStepResult,
    Sample,
    SampleResult,
    StepRefused,
)
from manylora.types.memory import admit_adapter


class Engine:
    """An engine is a base with adapters, for one thread at a time; errors come back as values.

    The verbs that take several operations return, for each, its result or the typed error that
    concerns its adapter alone.
    """

    def __init__(self, opening: Opening, mesh: Mesh | None = None):
        """Open the base; on a `mesh` this rank's part of it. Raises BaseModelError, Unsupported,
        DoesNotFit: see `manylora.models.open_base`."""
        if opening.threads is not None:
            torch.set_num_threads(opening.threads)
        settle_functions()
        self.base: BaseModel = open_base(
            opening.base,
            dtype=opening.dtype,
            device=opening.device,
            quantization=opening.quantization,
            mesh=mesh,
        )
        self.mesh = self.base.mesh
        if self.base.device.type == "cpu":
            keep_freed_memory()
        whole_products(self.base.device, self.base.dtype)  # found out now, not in the first step
        self.token_budget = opening.token_budget
        groups = wrap_linears(self.base.model, map(site_of, find_linears(self.base)))
        self.sites = tuple(site for group in groups for site in group.sites)
        self.index = SiteIndex(self.sites, place_on(self.mesh))
        if opening.activation_checkpointing:
            checkpoint_activations(self.base)
        if self._ranks > 1:
            visit_every_block(self.base)
        self.head_loss = HeadLoss(self.base.head, groups[-1].number)
        self._memory = FreeMemory(self.base.device)
        self.adapters: dict[str, Adapter] = {}
        self.snapshots: dict[str, AdapterWeights] = {}
        most = cached_tokens(self.base, self.free_bytes - kept_twice_bytes(self.base))
        loop = DecodeLoop(
            self.base, token_budget=self.token_budget, max_cached_tokens=most or MAX_CACHED_TOKENS
        )
        self.decoder = Decoder(self.base, loop, self._weights_of, most)

    @property
    def tokenizer(self) -> Any:
        """The base has this tokenizer; None if its folder has none."""
        return self.base.tokenizer

    @property
    def free_bytes(self) -> int:
        """This many bytes of the device could be taken now."""
        return self._memory.now()

    @property
    def room_bytes(self) -> int:
        """More adapters could take this many bytes: what is free and not promised to those here."""
        promised = sum(a.promised_bytes() for a in self.adapters.values())
        return self.free_bytes - promised - self.decoder.promised_bytes

    # -- adapters -------------------------------------------------------------------------------

    def create(self, name: str, spec: AdapterSpec) -> Adapter:
        """Make a new adapter, which changes nothing yet. Raises AdapterExists, TargetError,
        DoesNotFit."""
        layout = plan_layout(spec, resolve_targets(spec, self.sites))
        self._admit(name, spec, layout)
        return self.restore(name, fresh_state(spec, layout))

    def restore(self, name: str, state: AdapterState) -> Adapter:
        """Make an adapter with the given state, whose layout must be this base's. Raises
        AdapterExists, DoesNotFit."""
        self._admit(name, state.spec, state.layout)
        home = named_seed(0, name) % self._ranks
        self.adapters[name] = Adapter(state, self.index, self.base.device, home)
        return self.adapters[name]

    def _admit(self, name: str, spec: AdapterSpec, layout: Layout) -> None:
        if name in self.adapters:
            raise AdapterExists(f"an adapter named {name!r} exists already; choose another name")
        if self.mesh.world.size == 1:  # several must agree: there the control process decides
            admit_adapter(name, spec.rank, layout.num_params, spec.dtype, self.room_bytes)

    def base_weight(self, site: str) -> Floats:
        """Copy the frozen weight [N, K] of a linear layer, in fp32."""
        layer = self.base.model.get_submodule(site).base
        assert isinstance(layer, nn.Linear)
        return to_array(whole_weight(layer, self.base.mesh))

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
        """Copy everything that training the adapter needs."""
        return gathered_state(self._adapter(name), self.mesh)

    def snapshot(self, name: str, snapshot: str) -> None:
        """Freeze a copy of the adapter's weights under the name `snapshot`."""
        self.snapshots[snapshot] = self._adapter(name).weights.snapshot(self.index)

    def snapshot_state(self, snapshot: str) -> AdapterState:
        """Return a snapshot as a state (fp32), to be stored elsewhere."""
        weights = self.snapshots[snapshot]
        return AdapterState(weights.spec, weights.layout, gathered_weights(weights, self.mesh))

    def install_snapshot(self, snapshot: str, state: AdapterState) -> None:
        """Bring a snapshot back that `snapshot_state` gave."""
        dtype = DTYPES[state.spec.dtype]
        part = part_of(state.layout, self.sites, self.index.place)
        weights_P = to_tensor(part.take(state.weights), self.base.device, dtype)
        self.snapshots[snapshot] = AdapterWeights(state.spec, part, weights_P, self.index)

    def drop_snapshot(self, snapshot: str) -> None:
        """Forget a snapshot."""
        self.snapshots.pop(snapshot, None)

    # -- training -------------------------------------------------------------------------------

    def forward_backward(
        self, works: Sequence[ForwardBackward]
    ) -> list[ForwardBackwardResult | ManyloraError]:
        """Run the work of any number of adapters, merged into micro-batches.

        Returns:
            For each operation its result, or: DataError, DatumTooLong, DoesNotFit, AdapterNotFound,
            NotFinite. After an error the adapter's pending gradients are refused by its next
            optimizer step; after an exception, those of every adapter of the call.
        """
        outcomes: dict[int, ForwardBackwardResult | ManyloraError] = {}
        losses: list[tuple[Loss, Settings] | None] = [None] * len(works)
        for number, work in enumerate(works):
            try:
                self._weights_of(work)
                loss = check(work, self.base)
                admit_work(work, self.base, self._memory)
                losses[number] = loss
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
        return [outcomes[number] for number in range(len(works))]

    def optim_step(self, steps: Sequence[OptimStep]) -> list[OptimStepResult | ManyloraError]:
        """Step the adapters that are due, each by its own norm, clip and hyper-parameters; return
        for each its result, or: StepRefused, NotFinite (weights and moments unchanged, the gradient
        dropped), AdapterNotFound."""
        outcomes: dict[int, OptimStepResult | ManyloraError] = {}
        due: dict[int, Due] = {}
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
                due[number] = step, adapter
        stepped = step_on_mesh(list(due.values()), self.mesh, self.base.device)
        outcomes.update(zip(due, stepped, strict=True))
        return [outcomes[number] for number in range(len(steps))]

    # -- sampling -------------------------------------------------------------------------------

    @property
    def decoding(self) -> int:
        """This many sampling requests are not finished."""
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

    def interrupt(self, sample: Sample) -> None:
        """End a sampling request, if it is still decoding; see `Decoder.interrupt`."""
        self.decoder.interrupt(sample)

    def sample(self, requests: Sequence[Sample]) -> list[SampleResult | ManyloraError]:
        """Admit requests and decode until all are finished; for callers without a scheduler."""
        return self.decoder.sample(requests)

    # -- inside ---------------------------------------------------------------------------------

    def _run_all(
        self,
        works: Sequence[ForwardBackward],
        losses: Sequence[tuple[Loss, Settings] | None],
        outcomes: dict[int, ForwardBackwardResult | ManyloraError],
        *,
        backward: bool,
    ) -> None:
        """Run the sound operations of one kind; their outcomes are filled in."""
        runnable = [
            (number, work)
            for number, work in enumerate(works)
            if losses[number] is not None and work.backward == backward
        ]
        plan = self._plan(runnable, backward=backward)
        known = cast(Losses, losses)  # of all that have pieces
        rows = [
            self._run(
                build(
                    batch,
                    self.adapters,
                    known,
                    backward=backward,
                    device=self.base.device,
                    snapshots=self.snapshots,
                ),
                backward=backward,
            )
            for batch in plan.batches[self.mesh.dp.index]
        ]
        pieces = gathered(found(rows, known), plan, known, self.mesh.dp, self.base.device)
        for number, result in results(pieces, plan, known, runnable):
            outcomes[number] = self._finite(works[number], result)

    def _run(self, batch: MicroBatch, *, backward: bool) -> Rows:
        return run(self.base, self.head_loss, batch, backward=backward)

    def _plan(self, runnable: Sequence[tuple[int, ForwardBackward]], *, backward: bool) -> Plan:
        """Say which rank runs what; with `backward`, tell the adapters what they will have seen."""
        names = (whose(work) for _, work in runnable)
        adapters = {name: self.adapters[name] for name in names if isinstance(name, str)}
        plan = make_plan(
            runnable,
            self.token_budget,
            draws={name: adapter.draws for name, adapter in adapters.items()},
            ranks=self._ranks,
            homes={name: adapter.home for name, adapter in adapters.items() if backward},
        )
        if backward:
            counts = plan.counts()
            for name, adapter in adapters.items():
                if name in counts:
                    adapter.draws += counts[name]
                    adapter.note_grad(plan.homes[name], plan.shares[name])
        return plan

    @property
    def _ranks(self) -> int:
        """The mesh has this many data-parallel ranks."""
        return self.mesh.dp.size

    def _poison(self, work: ForwardBackward, error: Exception) -> None:
        adapter = None if work.adapter is None else self.adapters.get(work.adapter)
        if adapter is not None and work.backward and adapter.poison is None:
            adapter.poison = str(error)

    def _finite(
        self, work: ForwardBackward, result: ForwardBackwardResult
    ) -> ForwardBackwardResult | ManyloraError:
        if np.isfinite(result.loss):
            return result
        error = NotFinite(
            f"{work.called}: the loss is {result.loss}; lower the learning rate or look "
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

    def _weights_of(self, operation: Sample | ForwardBackward) -> AdapterWeights | None:
        """Return what an operation is to be answered with; None = the bare base."""
        if operation.snapshot is not None:
            if operation.snapshot not in self.snapshots:
                raise AdapterNotFound(f"no snapshot named {operation.snapshot!r}")
            return self.snapshots[operation.snapshot]
        return None if operation.adapter is None else self._adapter(operation.adapter).weights


def run(base: BaseModel, head_loss: HeadLoss, batch: MicroBatch, *, backward: bool) -> Rows:
    """Run one micro-batch; the gradients are added to those of its adapters."""
    table = RoutingTable(batch.segments, training=backward)
    stream = PackedStream(batch.lengths, batch.total)
    with torch.set_grad_enabled(backward), routing(table), packed(stream):
        hidden_TH = base.hidden(batch.tokens_T, batch.positions_T)
        out = head_loss(hidden_TH.detach(), batch.head, table, backward=backward)
        # Nothing to do below the head if only the head carries adapters.
        if out.grad_TH is not None and hidden_TH.requires_grad:
            hidden_TH.backward(out.grad_TH)
        out.grad_TH = None  # the rest is kept until all micro-batches have been started
    return Rows(batch, out)


def visit_every_block(base: BaseModel) -> None:
    """Have every backward go down to the first block, whichever adapters there are.

    A backward otherwise ends where no adapter asks for more; with a base in shares, ranks with
    other adapters, or none, would then gather its blocks less often than their neighbours.
    """
    base.model.get_input_embeddings().register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    # The embedding is frozen, so that its output is a leaf.
    return output.requires_grad_() if torch.is_grad_enabled() else output
