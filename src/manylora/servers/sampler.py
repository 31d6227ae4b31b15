"""A `Sampler` continues token ids with published versions of adapters' weights.

Who trains does not know which sampler it has. Every request names its version when it is made: an
unknown version is an error, never the newest, and never the base.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from manylora.types import DeviceTime, SamplingParams, Scoring
from manylora.types.data import Array

StopReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A `Policy` is one version of an adapter's weights, as it was published.

    Attributes:
        adapter: the adapter's name.
        registration: tells an adapter from an earlier one of its name, as after a restart.
        version: the weights after so many steps.
    """

    adapter: str
    registration: str
    version: int


@dataclass(frozen=True, slots=True)
class Published:
    """A `Published` version may be named by requests.

    Attributes:
        seconds: what publishing took, in which the adapter's training was held up or not.
    """

    policy: Policy
    seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A `Turn` is what a policy answered to token ids.

    Attributes:
        tokens: the new ones, a stop token included.
        logprobs: of each new token, under the temperature-scaled, untruncated distribution.
        version: of the weights that every token was drawn from.
        stop_reason: `stop`, `length` (max_tokens or the context's end), or `interrupted`.
        device: what it cost, as far as that is known; two turns are compared without it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: int
    stop_reason: StopReason
    device: DeviceTime = field(default=DeviceTime(), compare=False)


@dataclass(frozen=True, slots=True)
class ServerState:
    """A `ServerState` says how one of the places that sample is.

    Attributes:
        address: where it is; "" = in this process.
        healthy: it answers.
        policies: what may be named there.
        running: requests that it is answering.
    """

    address: str
    healthy: bool
    policies: tuple[Policy, ...]
    running: int


class Weights(Protocol):
    """`Weights` are a frozen copy of an adapter's; its owner drops it, after it was retired.

    `api.SnapshotHandle` has these methods; which of them are called is the sampler's matter.
    """

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, scoring: Scoring
    ) -> Future[Any]:
        """Continue prompts in the engine."""

    def interrupt(self) -> Future[None]:
        """Have all samples of the adapter, of whatever version, answer with what they have."""

    def export(self, folder: Path) -> Future[Path]:
        """Write a PEFT folder."""


class Generating(Protocol):
    """`Generating` is what a rollout needs of a sampler."""

    async def generate(
        self, policy: Policy, ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Turn:
        """Continue token ids. Raises AdapterNotFound where the policy is not published."""


class Sampler(Generating, Protocol):
    """A `Sampler` takes ids and gives ids; texts are not its matter."""

    async def publish(self, adapter: str, version: int, weights: Weights) -> Published:
        """Return once the version may be named. A version that is published stays as it is."""

    async def score(self, policy: Policy, ids: Sequence[int]) -> Array:
        """Return log-probabilities, float32, of `ids[1:]` at temperature 1."""

    async def interrupt(self, adapter: str) -> None:
        """Have the adapter's running requests answer with what they have."""

    async def retire(self, policy: Policy) -> None:
        """Forget a version once no request names it any more."""

    async def health(self) -> list[ServerState]:
        """Say how each place that samples is."""

    async def close(self) -> None:
        """Retire everything that was published here."""
