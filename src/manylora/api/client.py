"""By these handles programs train and sample the adapters of one owner on a host."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.api.samplable import Asked, Samplable
from manylora.checkpoint import import_peft, save_state
from manylora.checkpoint.tensor_files import rounded
from manylora.hosting.engine_protocol import Resident
from manylora.hosting.futures import flattened
from manylora.hosting.host import Host
from manylora.hosting.pager import Pager
from manylora.hosting.state_files import read_state, term, write_peft, write_state
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState
from manylora.scheduler import OperationQueue
from manylora.types import (
    AdamParams,
    AdapterSpec,
    CheckpointMismatch,
    ConfigError,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    OptimStepResult,
    Sample,
    TextFormat,
    Wanted,
)

NAME = re.compile(r"[A-Za-z0-9._-]+")
JSON = Any

if TYPE_CHECKING:
    from manylora.models.vocabulary import Vocabulary


class AdapterClient(Samplable):
    """A client offers what `Trainer` does, on a shared host.

    Its `sample` and `forward` are of the bare base.

    Attributes:
        adapters: name → handle.
        base_name: the base as it was named.
        context_length: tokens of the longest sequence that the base takes.
        fingerprint: this digest tells whether a checkpoint belongs to this base.
        sites: adapters can act on these linear layers.
    """

    def __init__(self, host: Host, *, tenant: str = ""):
        """Begin without an adapter; `tenant` says whose operations these are, for fairness."""
        self._host, self._tenant = host, tenant
        self._engine = engine = host.engine
        self.base_name = engine.base.name
        self.context_length = engine.base.context_length
        self.fingerprint = engine.base.fingerprint
        self.sites: tuple[Site, ...] = engine.sites
        self._snapshot_numbers = itertools.count(1)
        self.adapters: dict[str, AdapterHandle] = {}

    @property
    def tokenizer(self) -> Any:
        """This is the base's tokenizer; None if its folder has none."""
        return self._engine.tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The base's files say this of its tokens."""
        # Where an engine is in processes of its own, this one does without torch until a run asks.
        from manylora.models.vocabulary import read_vocabulary

        return read_vocabulary(self._engine.base.folder)

    # -- adapters -------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        spec: AdapterSpec | None = None,
        *,
        init_from: str | Path | None = None,
        **settings: Any,
    ) -> AdapterHandle:
        """Make a new adapter.

        Args:
            name: letters, digits, `.`, `_`, `-`; unique on this host.
            spec: its settings, or give them as keywords: `rank=8, alpha=16, targets=…`.
            init_from: a PEFT folder to start from; its rank, alpha and targets must be those of
                `spec`, if that is given.

        Raises:
            ConfigError, TargetError, AdapterExists, CheckpointMismatch, Unsupported
        """
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is not a name; use letters, digits, '.', '_' and '-'")
        if spec is not None and settings:
            raise ConfigError("give either an AdapterSpec or keywords, not both")
        if init_from is None:
            return self._new(name, spec or AdapterSpec(**settings), TextFormat())
        wanted = spec or (AdapterSpec(**settings) if settings else None)
        return self._new(name, *self._warm_start(Path(init_from), wanted))

    def restore(
        self, name: str, folder: str | Path, *, spec: AdapterSpec | None = None
    ) -> tuple[AdapterHandle, dict[str, JSON]]:
        """Make an adapter that goes on exactly where `AdapterHandle.save` left it.

        Args:
            folder: what `save` wrote.
            spec: the settings that the caller expects; others are refused.

        Returns:
            The handle, and the JSON that the caller had saved with it.

        Raises:
            CheckpointDamaged, CheckpointMismatch, AdapterExists
        """
        saved = read_state(self._engine, Path(folder), spec=spec)
        return self._new(name, saved.state, saved.text_format), dict(saved.client)

    # -- inside -----------------------------------------------------------------------------------

    def _call(self, adapter: str, run: Callable[[Pager], Any]) -> Future[Any]:
        return self._host.call(adapter, run, tenant=self._tenant)

    def _ask(self, operation: Asked) -> Future[Any]:
        return self._host.submit(replace(operation, tenant=self._tenant))

    def _new(
        self, name: str, what: AdapterSpec | AdapterState, text_format: TextFormat
    ) -> AdapterHandle:
        """Return a handle on an adapter that is made of its settings or of a state."""

        def make(pager: Pager) -> Resident:
            if isinstance(what, AdapterSpec):
                pager.create(name, what)
            else:
                pager.restore(name, what)
            return self._host.resident(name)

        new: Resident = self._call(name, make).result()
        handle = AdapterHandle(self, name, new.spec, new.layout.num_params)
        handle.text_format = text_format
        self.adapters[name] = handle
        return handle

    def _warm_start(
        self, folder: Path, spec: AdapterSpec | None
    ) -> tuple[AdapterState, TextFormat]:
        imported = import_peft(folder, self.sites, base_weight=self._engine.base_weight)
        if spec is None:
            state = AdapterState(imported.spec, imported.layout, imported.weights_P)
            return state, imported.text_format
        layout = plan_layout(spec, resolve_targets(spec, self.sites))
        found, wanted = ({term(f) for f in of.factors} for of in (imported.layout, layout))
        if found != wanted:
            only = sorted(found ^ wanted)[:3]
            raise CheckpointMismatch(
                f"{folder} does not fit the adapter's settings (site, rank or scale of {only}); "
                "give the rank, alpha and targets that it was trained with, or leave them out"
            )
        return AdapterState(spec, layout, imported.weights_P), imported.text_format


class AdapterHandle(Samplable):
    """A handle is for one adapter: every method queues an operation and returns a future.

    Operations of one adapter run in the order in which they were called; those of different
    adapters are merged into shared batches. Submit ahead, read later: a step's
    `forward_backward` and `optim_step` can both be queued before either result is read.

    Attributes:
        name: unique among the trainer's adapters.
        spec: its settings.
        num_params: numbers in A and B together.
        text_format: how its texts became tokens, and where its answers end by default; recorded
            with what `save` and `export` write.
    """

    def __init__(self, client: AdapterClient, name: str, spec: AdapterSpec, num_params: int):
        self._client = client
        self._unit_number = client._host.placement.of_adapter(name)
        self.name = name
        self.spec = spec
        self.num_params = num_params
        self.text_format = TextFormat()

    def __repr__(self) -> str:
        return f"<adapter {self.name!r}: rank {self.spec.rank}, {self.num_params:,} parameters>"

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        *,
        logprobs: Wanted = "all",
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Future[ForwardBackwardResult]:
        """Add the gradient of the summed loss of `data` to what has accumulated.

        Args:
            data: any number of sequences; see `Datum` for what each loss needs.
            loss: cross_entropy, importance_sampling, ppo, cispo, dro or gspo.
            config: the loss's settings, e.g. {"clip_high_threshold": 1.3}. Those of policies all
                take `kl_estimator`, 1.0, 2.0 or 3.0 (see `losses.kl`), for data that hold the
                policy to a reference.
            logprobs: "all", or "trained" if those of the positions without a weight (or
                advantage) are not needed; the less is trained, the more time that saves. Loss and
                gradient are the same.
            temperature: T > 0; log-probabilities, loss and gradient are those of softmax(z / T), z
                the logits: for a policy, the temperature that it was sampled at.
            entropy: also report the exact entropy, in nats, wherever a log-probability comes back.

        Returns:
            A future of log p(target) of every token, or every trained one, and the summed loss. It
            raises DataError, DatumTooLong or NotFinite; then the next `optim_step` is refused.
        """
        work = ForwardBackward(
            adapter=None,
            data=data,
            loss=loss,
            config=config or {},
            logprobs=logprobs,
            temperature=temperature,
            entropy=entropy,
        )
        return self._ask(work)

    def optim_step(
        self, params: AdamParams | None = None, **settings: float
    ) -> Future[OptimStepResult]:
        """Make one AdamW step on the accumulated gradient, which is then dropped.

        Args:
            params: hyper-parameters of this step, or give them as keywords: `lr=1e-3`,
                `beta1`, `beta2`, `eps`, `weight_decay`, `clip_norm`.

        Returns:
            A future of the step's number and the gradient's norm before clipping. It raises
            NotFinite (nothing was changed) or StepRefused (a forward_backward had failed).
        """
        params = AdamParams(**settings) if params is None else params
        step = OptimStep(adapter=self.name, params=params, tenant=self._client._tenant)
        return self._queue.submit(step)

    def snapshot(self) -> SnapshotHandle:
        """Freeze a copy of the weights at this point, to sample and to measure others by while
        training goes on."""
        client = self._client
        snapshot = f"{self.name}@{next(client._snapshot_numbers)}"
        client._host.snapshot(self.name, snapshot, tenant=client._tenant)
        return SnapshotHandle(self, snapshot)

    def restore_snapshot(self, folder: str | Path) -> SnapshotHandle:
        """Make a snapshot again of which `SnapshotHandle.save` wrote the folder.

        Raises:
            CheckpointDamaged, CheckpointMismatch
        """
        client, spec = self._client, self.spec
        state = read_state(client._host.engine, Path(folder), spec=spec).state
        snapshot = f"{self.name}@{next(client._snapshot_numbers)}"
        client._host.install_snapshot(self.name, snapshot, state, tenant=client._tenant)
        return SnapshotHandle(self, snapshot)

    def save(self, folder: str | Path, client: Mapping[str, JSON] | None = None) -> Future[Path]:
        """Write the complete training state, atomically.

        Args:
            folder: does not exist yet, or holds an earlier state, which is then replaced.
            client: the caller's own JSON, given back by `Trainer.restore`.

        Returns:
            A future of the folder. It raises SaveFailed.
        """
        own, folder, text_format = dict(client or {}), Path(folder), self.text_format

        def write(state: AdapterState) -> None:
            save_state(
                folder,
                state,
                base_name=self._client.base_name,
                base_fingerprint=self._client.fingerprint,
                client=own,
                text_format=text_format,
            )

        return self._copy_then(folder, write)

    def export(self, folder: str | Path, *, merged: bool = False) -> Future[Path]:
        """Write a PEFT folder, or with `merged` a whole model with the adapter added in. The future
        is of the folder, and raises SaveFailed."""
        engine, folder, text_format = self._client._host.engine, Path(folder), self.text_format

        def write(state: AdapterState) -> None:
            if not merged:
                write_peft(engine, folder, state, text_format)
                return
            from manylora.checkpoint.merged import export_merged

            # As the layers read them, which in half precision is not the master copy.
            weights_P = rounded(state.weights, state.spec.dtype)
            export_merged(
                folder,
                engine.base.folder,
                state.layout,
                weights_P,
                base_fingerprint=engine.base.fingerprint,
                text_format=text_format,
            )

        return self._copy_then(folder, write)

    def interrupt(self) -> Future[None]:
        """End this adapter's samples, of its current weights and of its snapshots.

        It stands in no order. Samples that were asked for before answer at once with what they
        have (see `SampledSequence.stop_reason`); one that has not started, with empty sequences.
        What is asked for afterwards is not concerned, and no other adapter is.

        Returns:
            A future that is done once none of them decodes any more; their results follow.
        """
        return self._queue.interrupt(self.name)

    def unload(self) -> Future[None]:
        """Forget the adapter after what is queued for it has run; its name is free again."""
        client = self._client
        return client._host.unload(
            self.name, tenant=client._tenant, then=lambda: client.adapters.pop(self.name, None)
        )

    @property
    def _queue(self) -> OperationQueue:
        """This is the queue of the engine with which the adapter lives."""
        return self._client._host.units[self._unit_number].queue

    def _ask(self, operation: Asked) -> Future[Any]:
        return self._queue.submit(self._own(operation, self.text_format))

    def _own(self, operation: Asked, text_format: TextFormat) -> Asked:
        """Return this adapter's operation, with a text format's ends of an answer where it is a
        request that names none."""
        own = replace(operation, adapter=self.name, tenant=self._client._tenant)
        if isinstance(own, Sample) and own.params.stop is None and text_format.stop:
            own = replace(own, params=replace(own.params, stop=text_format.stop))
        return own

    def _copy_then(self, folder: Path, write: Callable[[AdapterState], None]) -> Future[Path]:
        """Copy the adapter's state in its turn; write it while others go on."""

        def run(pager: Pager) -> Future[Path]:
            return _written(pager, pager.whole_state(self.name), folder, write)

        return flattened(self._client._call(self.name, run))


class SnapshotHandle(Samplable):
    """A snapshot handle acts on an adapter's weights as they were when the snapshot was taken.

    Attributes:
        adapter: the adapter's name.
        name: the snapshot's own.
        text_format: the adapter's, for where answers end by default.
    """

    def __init__(self, handle: AdapterHandle, name: str):
        self._handle = handle
        self.adapter = handle.name
        self.name = name
        self.text_format = handle.text_format

    def save(self, folder: str | Path) -> Future[Path]:
        """Write the frozen weights, atomically, for `AdapterHandle.restore_snapshot`.

        Returns:
            A future of the folder. It raises SaveFailed.
        """
        engine, folder = self._handle._client._host.engine, Path(folder)
        return self._copy_then(folder, lambda it: write_state(engine, folder, it, position=0))

    def export(self, folder: str | Path) -> Future[Path]:
        """Write the frozen weights as a PEFT folder.

        Returns:
            A future of the folder. It raises SaveFailed.
        """
        engine, folder = self._handle._client._host.engine, Path(folder)
        return self._copy_then(
            folder, lambda state: write_peft(engine, folder, state, self.text_format)
        )

    def _copy_then(self, folder: Path, write: Callable[[AdapterState], None]) -> Future[Path]:
        def run(pager: Pager) -> Future[Path]:
            state = pager.snapshots.state(self.name)
            return _written(pager, state, folder, write)

        return flattened(self._handle._client._call(self.adapter, run))

    def interrupt(self) -> Future[None]:
        """See `AdapterHandle.interrupt`, whose samples these are, too."""
        return self._handle.interrupt()

    def drop(self) -> Future[None]:
        """Free the copy."""
        client = self._handle._client
        return client._host.drop_snapshot(self.name, adapter=self.adapter, tenant=client._tenant)

    def _ask(self, operation: Asked) -> Future[Any]:
        operation = replace(operation, snapshot=self.name)
        return self._handle._queue.submit(self._handle._own(operation, self.text_format))


def _written(
    pager: Pager, state: AdapterState, folder: Path, write: Callable[[AdapterState], None]
) -> Future[Path]:
    """Write a copy of a state while others go on; return a future of its folder."""

    def put() -> Path:
        write(state)
        return folder

    return pager.write(put, state, quiet=True)
