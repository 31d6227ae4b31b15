"""What every kind of weights can be asked: to continue prompts, and how likely data are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from manylora.types import (
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    Sample,
    SampleResult,
    SamplingParams,
    Scoring,
    Wanted,
)

Asked = TypeVar("Asked", Sample, ForwardBackward)


class Samplable(ABC):
    """`Samplable` weights continue prompts, and say how likely data are: an adapter's, a
    snapshot's, or the bare base's."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        num_samples: int = 1,
        scoring: Scoring | None = None,
    ) -> Future[SampleResult]:
        """Continue each prompt with the weights as they are at this point.

        What is queued for an adapter after a sample of it waits until that is finished; a sample of
        a snapshot does not have that effect.

        Args:
            prompts: token ids.
            params: how; by default greedily, at most 64 tokens. Without a `stop` of its own an
                answer ends where the adapter's `text_format` says, or else where the base's do.
            num_samples: continuations of each prompt.
            scoring: what to report beside the tokens and their log-probabilities.

        Returns:
            A future of the sequences and scores. It raises DataError, DatumTooLong or NotFinite.
            It can be cancelled while it runs.
        """
        request = Sample(
            adapter=None,
            prompts=prompts,
            params=params or SamplingParams(),
            num_samples=num_samples,
            scoring=scoring or Scoring(),
        )
        return self._ask(request)

    def forward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        *,
        logprobs: Wanted = "all",
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Future[ForwardBackwardResult]:
        """Compute the loss of `data` as `forward_backward` does, without gradients.

        Where a policy is held to a reference (the bare base, or a snapshot of its beginning), this
        gives the reference's log-probabilities; no second model is opened. See
        `AdapterHandle.forward_backward` for the arguments.

        Returns:
            A future that raises DataError, DatumTooLong or NotFinite; of a snapshot that was
            dropped, AdapterNotFound.
        """
        work = ForwardBackward(
            adapter=None,
            data=data,
            loss=loss,
            config=config or {},
            backward=False,
            logprobs=logprobs,
            temperature=temperature,
            entropy=entropy,
        )
        return self._ask(work)

    @abstractmethod
    def _ask(self, operation: Asked) -> Future[Any]:
        """Queue an operation of the bare base as one of these weights."""
