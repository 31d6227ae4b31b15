"""Adapters of one owner on a host: made, restored, trained, sampled, saved, exported."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.api.handles import JSON, AdapterHandle, SnapshotHandle
from manylora.checkpoint import import_peft, save_state
from manylora.checkpoint.tensor_files import rounded
from manylora.hosting.engine_protocol import Resident
from manylora.hosting.futures import flattened
from manylora.hosting.pager import Pager
from manylora.hosting.replicas import AnyHost
from manylora.hosting.state_files import read_state, term, write_peft
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState
from manylora.scheduler import Operation
from manylora.types import (
    AdapterSpec,
    CheckpointMismatch,
    ConfigError,
    Sample,
    SampleResult,
    SamplingParams,
    Scoring,
    TextFormat,
)

NAME = re.compile(r"[A-Za-z0-9._-]+")

if TYPE_CHECKING:
    from manylora.models.vocabulary import Vocabulary


class AdapterClient:
    """What `Trainer` offers, on a host that may have others.

    Attributes:
        adapters: name → handle.
    """

    def __init__(self, host: AnyHost, *, tenant: str = ""):
        """`tenant`: whose operations these are, for fairness."""
        self._host, self._tenant = host, tenant
        self._engine = host.engine
        self._snapshot_numbers = itertools.count(1)
        self.adapters: dict[str, AdapterHandle] = {}

    @property
    def base_name(self) -> str:
        """The base as it was named."""
        return self._engine.base.name

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer; None if its folder has none."""
        return self._engine.tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the base's files say of its tokens."""
        # Where an engine is in processes of its own, this one does without torch until a run asks.
        from manylora.models.vocabulary import read_vocabulary

        return read_vocabulary(self._engine.base.folder)

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that the base takes."""
        return self._engine.base.context_length

    @property
    def fingerprint(self) -> str:
        """Tells whether a checkpoint belongs to this base."""
        return self._engine.base.fingerprint

    @property
    def sites(self) -> tuple[Site, ...]:
        """The linear layers that adapters can act on."""
        return self._engine.sites

    # -- adapters -------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        spec: AdapterSpec | None = None,
        *,
        init_from: str | Path | None = None,
        **settings: Any,
    ) -> AdapterHandle:
        """A new adapter.

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
        wanted = spec or (AdapterSpec(**settings) if settings or init_from is None else None)
        text_format = TextFormat()
        if init_from is None:
            assert wanted is not None
            new = self._call(name, lambda pager: self._make(pager, name, wanted)).result()
        else:
            state, text_format = self._warm_start(Path(init_from), wanted)
            new = self._call(name, lambda pager: self._make(pager, name, state)).result()
        return self._handle(new, name, text_format)

    def restore(
        self, name: str, folder: str | Path, *, spec: AdapterSpec | None = None
    ) -> tuple[AdapterHandle, dict[str, JSON]]:
        """An adapter that goes on exactly where `AdapterHandle.save` left it.

        Args:
            folder: what `save` wrote.
            spec: the settings that the caller expects; others are refused.

        Returns:
            The handle, and the JSON that the caller had saved with it.

        Raises:
            CheckpointDamaged, CheckpointMismatch, AdapterExists
        """
        saved = read_state(self._engine, Path(folder), spec=spec)
        new = self._call(name, lambda pager: self._make(pager, name, saved.state)).result()
        return self._handle(new, name, saved.text_format), dict(saved.client)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        num_samples: int = 1,
        scoring: Scoring | None = None,
    ) -> Future[SampleResult]:
        """Continue each prompt (token ids) with the bare base; see `AdapterHandle.sample`."""
        request = Sample(
            adapter=None,
            prompts=prompts,
            params=params or SamplingParams(),
            num_samples=num_samples,
            scoring=scoring or Scoring(),
        )
        return self.submit(request)

    # -- what the handles use ---------------------------------------------------------------------

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation behind the others of its adapter."""
        if self._tenant:
            operation = replace(operation, tenant=self._tenant)
        return self._host.submit(operation)

    def save(self, name: str, folder: Path, client: Mapping[str, JSON]) -> Future[Path]:
        """See `AdapterHandle.save`."""
        text_format = self._text_format(name)

        def write(state: AdapterState) -> None:
            save_state(
                folder,
                state,
                base_name=self.base_name,
                base_fingerprint=self.fingerprint,
                client=client,
                text_format=text_format,
            )

        return self._copy_then(name, folder, write)

    def export(self, name: str, folder: Path, *, merged: bool) -> Future[Path]:
        """See `AdapterHandle.export`."""
        text_format = self._text_format(name)

        def write(state: AdapterState) -> None:
            if not merged:
                write_peft(self._engine, folder, state, text_format)
                return
            from manylora.checkpoint.merged import export_merged

            # As the layers read them, which in half precision is not the master copy.
            weights_P = rounded(state.weights, state.spec.dtype)
            export_merged(
                folder, self._engine.base.folder, state.layout, weights_P,
                base_fingerprint=self.fingerprint, text_format=text_format,
            )  # fmt: skip

        return self._copy_then(name, folder, write)

    def unload(self, name: str) -> Future[None]:
        """See `AdapterHandle.unload`."""

        def run(pager: Pager) -> None:
            pager.unload(name)
            self.adapters.pop(name, None)

        return self._call(name, run, last=True)

    def take_snapshot(self, name: str) -> SnapshotHandle:
        """See `AdapterHandle.snapshot`."""
        snapshot = f"{name}@{next(self._snapshot_numbers)}"
        self._call(name, lambda pager: pager.snapshot(name, snapshot, 0), makes=snapshot)
        return SnapshotHandle(self, name, snapshot)

    def drop_snapshot(self, name: str, snapshot: str) -> Future[None]:
        """See `SnapshotHandle.drop`."""
        return self._call(name, lambda pager: pager.drop_snapshot(snapshot), drops=snapshot)

    # -- inside -----------------------------------------------------------------------------------

    def _call(
        self,
        adapter: str | None,
        run: Callable[[Pager], Any],
        *,
        makes: str | None = None,
        drops: str | None = None,
        last: bool = False,
    ) -> Future[Any]:
        return self._host.call(
            adapter, run, tenant=self._tenant, makes=makes, drops=drops, last=last
        )

    def _copy_then(
        self, name: str, folder: Path, write: Callable[[AdapterState], None]
    ) -> Future[Path]:
        """Copy an adapter's state in its turn; write it while others go on."""

        def run(pager: Pager) -> Future[Path]:
            state = pager.whole_state(name)

            def put() -> Path:
                write(state)
                return folder

            return pager.write(put, state, quiet=True)

        return flattened(self._call(name, run))

    def _make(self, pager: Pager, name: str, what: AdapterSpec | AdapterState) -> Resident:
        if isinstance(what, AdapterSpec):
            pager.create(name, what)
        else:
            pager.restore(name, what)
        return self._host.resident(name)

    def _handle(self, new: Resident, name: str, text_format: TextFormat) -> AdapterHandle:
        handle = AdapterHandle(self, name, new.spec, new.layout.num_params)
        handle.text_format = text_format
        self.adapters[name] = handle
        return handle

    def _text_format(self, name: str) -> TextFormat:
        return self.adapters[name].text_format if name in self.adapters else TextFormat()

    def _warm_start(
        self, folder: Path, spec: AdapterSpec | None
    ) -> tuple[AdapterState, TextFormat]:
        imported = import_peft(
            folder, self.sites, base_weight=lambda name: self._engine.base_weight(name)
        )
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
