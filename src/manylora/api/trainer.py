"""`Trainer`: one base, one engine, one queue."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import torch

from manylora.api.handle import JSON, AdapterHandle, SnapshotHandle
from manylora.checkpoint import export_merged, export_peft, import_peft, load_state, save_state
from manylora.engine import Engine
from manylora.lora.adapter import TORCH_DTYPES
from manylora.lora.layout import Factor, plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState
from manylora.scheduler import Call, Operation, OperationQueue, Worker
from manylora.types import (
    AdapterSpec,
    CheckpointMismatch,
    ConfigError,
    Sample,
    SampleResult,
    SamplingParams,
    Scoring,
)

NAME = re.compile(r"[A-Za-z0-9._-]+")


class Trainer:
    """Many LoRA adapters on one frozen base model.

    Use it as a context manager: leaving the block runs what is queued, then stops.

        with manylora.Trainer("seedling") as trainer:
            adapter = trainer.create("reverse", rank=8)
            forward = adapter.forward_backward(data)
            step = adapter.optim_step(lr=1e-3)
            print(forward.result().loss, step.result().grad_norm)
            adapter.export("out/reverse").result()

    Attributes:
        tokenizer: the base's Hugging Face tokenizer.
        adapters: name → handle.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        token_budget: int = 4096,
        dtype: str = "auto",
        device: str = "auto",
        activation_checkpointing: bool = False,
        threads: int | None = None,
    ):
        """Open a base.

        Args:
            base: `seedling`, a folder, or a hub id of any Hugging Face causal LM.
            token_budget: tokens of one packed micro-batch; a longer sequence runs alone.
            dtype: of the base: `auto` (as stored), `fp32`, `bf16`, `fp16`.
            device: `auto` (CUDA if there is one), `cpu`, `cuda:1`, …
            activation_checkpointing: less memory for a third more time.
            threads: CPU threads of one operation; None = torch's choice.

        Raises:
            BaseModelError: the base cannot be opened.
            Unsupported: its architecture would not keep its numbers here.
        """
        if token_budget < 1:
            raise ConfigError(f"token_budget is {token_budget}; it must be ≥ 1")
        if threads is not None:
            torch.set_num_threads(threads)
        self._engine = Engine(
            base,
            token_budget=token_budget,
            dtype=dtype,
            device=device,
            activation_checkpointing=activation_checkpointing,
        )
        self._queue = OperationQueue(token_budget)
        self._worker = Worker(self._queue, self._engine)
        self._snapshot_numbers = itertools.count(1)
        self.adapters: dict[str, AdapterHandle] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=error_type is not None)

    def close(self, *, cancel: bool = False) -> None:
        """Run what is queued (or, with `cancel`, drop what has not started), then stop."""
        self._queue.close()
        if cancel:
            self._queue.cancel_waiting()
        self._worker.join()

    @property
    def base_name(self) -> str:
        """The base as it was named."""
        return self._engine.base.name

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer; None if its folder has none."""
        return self._engine.base.tokenizer

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
            name: letters, digits, `.`, `_`, `-`; unique among this trainer's adapters.
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
        if init_from is None:
            assert wanted is not None
            new = self._call(name, lambda: self._engine.create(name, wanted)).result()
        else:
            state = self._warm_start(Path(init_from), wanted)
            new = self._call(name, lambda: self._engine.restore(name, state)).result()
        return self._handle(name, new.spec, new.layout.num_params)

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
        saved = load_state(Path(folder), spec=spec, base_fingerprint=self.fingerprint)
        # Planned anew, because input groups are numbered by the base that is open.
        layout = plan_layout(saved.state.spec, resolve_targets(saved.state.spec, self.sites))
        if {_term(f) for f in layout.factors} != {_term(f) for f in saved.state.layout.factors}:
            raise CheckpointMismatch(f"{folder}: its layers are not those of {self.base_name!r}")
        state = dataclasses.replace(saved.state, layout=layout)
        new = self._call(name, lambda: self._engine.restore(name, state)).result()
        return self._handle(name, new.spec, new.layout.num_params), dict(saved.client)

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
        return self._queue.submit(operation)

    def save(self, name: str, folder: Path, client: Mapping[str, JSON]) -> Future[Path]:
        """See `AdapterHandle.save`."""

        def run() -> Path:
            save_state(
                folder,
                self._engine.state(name),
                base_name=self.base_name,
                base_fingerprint=self.fingerprint,
                client=client,
            )
            return folder

        return self._call(name, run)

    def export(self, name: str, folder: Path, *, merged: bool) -> Future[Path]:
        """See `AdapterHandle.export`."""

        def run() -> Path:
            state = self._engine.state(name)
            if merged:
                # As the layers read them, which in half precision is not the master copy.
                weights_P = state.weights.to(TORCH_DTYPES[state.spec.dtype]).float()
                export_merged(
                    folder, self._engine.base.folder, state.layout, weights_P,
                    base_fingerprint=self.fingerprint,
                )  # fmt: skip
            else:
                export_peft(
                    folder, state.spec, state.layout, state.weights,
                    base_name=self.base_name, sites=self.sites, base_fingerprint=self.fingerprint,
                )  # fmt: skip
            return folder

        return self._call(name, run)

    def unload(self, name: str) -> Future[None]:
        """See `AdapterHandle.unload`."""

        def run() -> None:
            self._engine.unload(name)
            self.adapters.pop(name, None)

        return self._call(name, run)

    def take_snapshot(self, name: str) -> SnapshotHandle:
        """See `AdapterHandle.snapshot`."""
        snapshot = f"{name}@{next(self._snapshot_numbers)}"
        self._call(name, lambda: self._engine.snapshot(name, snapshot))
        return SnapshotHandle(self, name, snapshot)

    def drop_snapshot(self, name: str, snapshot: str) -> Future[None]:
        """See `SnapshotHandle.drop`."""
        return self._call(name, lambda: self._engine.drop_snapshot(snapshot))

    # -- inside -----------------------------------------------------------------------------------

    def _call(self, adapter: str | None, run: Callable[[], Any]) -> Future[Any]:
        return self.submit(Call(adapter, run))

    def _handle(self, name: str, spec: AdapterSpec, num_params: int) -> AdapterHandle:
        self.adapters[name] = AdapterHandle(self, name, spec, num_params)
        return self.adapters[name]

    def _warm_start(self, folder: Path, spec: AdapterSpec | None) -> AdapterState:
        imported = import_peft(
            folder, self.sites, base_weight=lambda name: self._engine.base_weight(name)
        )
        if spec is None:
            return AdapterState(imported.spec, imported.layout, imported.weights_P)
        layout = plan_layout(spec, resolve_targets(spec, self.sites))
        found, wanted = ({_term(f) for f in of.factors} for of in (imported.layout, layout))
        if found != wanted:
            only = sorted(found ^ wanted)[:3]
            raise CheckpointMismatch(
                f"{folder} does not fit the adapter's settings (site, rank or scale of {only}); "
                "give the rank, alpha and targets that it was trained with, or leave them out"
            )
        return AdapterState(spec, layout, imported.weights_P)


def _term(factor: Factor) -> tuple[str, int, float]:
    """What a factor adds: where, of which rank, on which scale."""
    return factor.site, factor.rank, round(factor.scale, 9)
