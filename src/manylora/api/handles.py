"""Handles on adapters and snapshots: every method queues an operation and returns a future."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from manylora.scheduler import Operation
from manylora.types import (
    AdamParams,
    AdapterSpec,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    OptimStepResult,
    Sample,
    SampleResult,
    SamplingParams,
    Scoring,
    TextFormat,
    Wanted,
)

JSON = Any


class Door(Protocol):
    """What the handles need of a `Trainer`."""

    def submit(self, operation: Operation) -> Future[Any]: ...

    def save(self, name: str, folder: Path, client: Mapping[str, JSON]) -> Future[Path]: ...

    def export(self, name: str, folder: Path, *, merged: bool) -> Future[Path]: ...

    def unload(self, name: str) -> Future[None]: ...

    def take_snapshot(self, name: str) -> SnapshotHandle: ...

    def drop_snapshot(self, name: str, snapshot: str) -> Future[None]: ...


class AdapterHandle:
    """One adapter of a `Trainer`.

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

    def __init__(self, door: Door, name: str, spec: AdapterSpec, num_params: int):
        self._door = door
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
    ) -> Future[ForwardBackwardResult]:
        """Add the gradient of the summed loss of `data` to what has accumulated.

        Args:
            data: any number of sequences; see `Datum` for what each loss needs.
            loss: cross_entropy, importance_sampling, ppo, cispo, dro or gspo.
            config: the loss's settings, e.g. {"clip_high_threshold": 1.3}.
            logprobs: "all", or "trained" if those of the positions without a weight (or
                advantage) are not needed; the less is trained, the more time that saves. Loss and
                gradient are the same.

        Returns:
            A future of log p(target) of every token, or every trained one, and the summed loss. It
            raises DataError, DatumTooLong or NotFinite; then the next `optim_step` is refused.
        """
        return self._work(data, loss, config, logprobs, backward=True)

    def forward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        *,
        logprobs: Wanted = "all",
    ) -> Future[ForwardBackwardResult]:
        """The same without gradients."""
        return self._work(data, loss, config, logprobs, backward=False)

    def optim_step(
        self, params: AdamParams | None = None, **settings: float
    ) -> Future[OptimStepResult]:
        """One AdamW step on the accumulated gradient, which is then dropped.

        Args:
            params: hyper-parameters of this step, or give them as keywords: `lr=1e-3`,
                `beta1`, `beta2`, `eps`, `weight_decay`, `clip_norm`.

        Returns:
            A future of the step's number and the gradient's norm before clipping. It raises
            NotFinite (nothing was changed) or StepRefused (a forward_backward had failed).
        """
        params = AdamParams(**settings) if params is None else params
        return self._door.submit(OptimStep(adapter=self.name, params=params))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        num_samples: int = 1,
        scoring: Scoring | None = None,
    ) -> Future[SampleResult]:
        """Continue each prompt (token ids) with the weights as they are at this point.

        What is queued for this adapter after it waits until it is finished; `snapshot` does not
        have that effect.

        Args:
            params: how; by default greedily, at most 64 tokens. Without a `stop` of its own an
                answer ends where the adapter's `text_format` says, or else where the base's do.
            num_samples: continuations of each prompt.
            scoring: what to report beside the tokens and their log-probabilities.

        Returns:
            A future of the sequences and scores. It raises DataError, DatumTooLong or NotFinite.
            It can be cancelled while it runs.
        """
        request = Sample(
            adapter=self.name,
            prompts=prompts,
            params=_stopping(params, self.text_format),
            num_samples=num_samples,
            scoring=scoring or Scoring(),
        )
        return self._door.submit(request)

    def snapshot(self) -> SnapshotHandle:
        """A frozen copy of the weights at this point, for sampling while training goes on."""
        snapshot = self._door.take_snapshot(self.name)
        snapshot.text_format = self.text_format
        return snapshot

    def save(self, folder: str | Path, client: Mapping[str, JSON] | None = None) -> Future[Path]:
        """Write the complete training state, atomically.

        Args:
            folder: does not exist yet, or holds an earlier state, which is then replaced.
            client: the caller's own JSON, given back by `Trainer.restore`.

        Returns:
            A future of the folder. It raises SaveFailed.
        """
        return self._door.save(self.name, Path(folder), dict(client or {}))

    def export(self, folder: str | Path, *, merged: bool = False) -> Future[Path]:
        """Write a PEFT folder, or with `merged` a whole model with the adapter added in.

        Returns:
            A future of the folder. It raises SaveFailed.
        """
        return self._door.export(self.name, Path(folder), merged=merged)

    def unload(self) -> Future[None]:
        """Forget the adapter after what is queued for it has run; its name is free again."""
        return self._door.unload(self.name)

    def _work(
        self,
        data: Sequence[Datum],
        loss: str,
        config: Mapping[str, float] | None,
        logprobs: Wanted,
        *,
        backward: bool,
    ) -> Future[ForwardBackwardResult]:
        return self._door.submit(
            ForwardBackward(
                adapter=self.name,
                data=data,
                loss=loss,
                config=config or {},
                backward=backward,
                logprobs=logprobs,
            )
        )


class SnapshotHandle:
    """An adapter's weights as they were when the snapshot was taken."""

    def __init__(self, door: Door, adapter: str, name: str):
        self._door = door
        self.adapter = adapter
        self.name = name
        self.text_format = TextFormat()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        num_samples: int = 1,
        scoring: Scoring | None = None,
    ) -> Future[SampleResult]:
        """Continue each prompt (token ids) with the frozen weights; see `AdapterHandle.sample`."""
        request = Sample(
            adapter=self.adapter,
            prompts=prompts,
            params=_stopping(params, self.text_format),
            num_samples=num_samples,
            snapshot=self.name,
            scoring=scoring or Scoring(),
        )
        return self._door.submit(request)

    def drop(self) -> Future[None]:
        """Free the copy."""
        return self._door.drop_snapshot(self.adapter, self.name)


def _stopping(params: SamplingParams | None, text_format: TextFormat) -> SamplingParams:
    """The parameters, with the adapter's ends of an answer where they name none."""
    params = params or SamplingParams()
    if params.stop is not None or not text_format.stop:
        return params
    return replace(params, stop=text_format.stop)
