"""A client asks these operations of an adapter; the scheduler queues and the engine runs them.

Every operation says whose it is (`tenant`, for fairness) and, where the client numbers its
operations, which one it is (`seq`, for knowing what a saved state contains).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from manylora.types.adapter_spec import AdamParams
from manylora.types.data import Array, Datum
from manylora.types.sampling import SamplingParams, Scoring

# The positions whose log-probabilities an operation wants: all, or only the trained ones.
Wanted = Literal["all", "trained"]
WANTED: tuple[Wanted, ...] = get_args(Wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward:
    """A `ForwardBackward` computes the loss and log-probabilities of `data`, and gradients.

    Gradients add up over any number of calls until the adapter's own optimizer step; there are none
    if `backward` is False.

    Attributes:
        adapter: whose weights and gradient, and the adapter in whose order it stands. None = it
            stands in no order, and the weights are those of the bare base or of `snapshot`.
        snapshot: the frozen copy to use in place of current weights. It has no gradient, and
            neither has the bare base: both need `backward` to be False.
        logprobs: which log-probabilities come back. With "trained" the output head, a large part
            of a model with many words, runs on the trained positions only: by `cross_entropy` those
            with a weight that is not 0, by the policy losses those with such an advantage (`gspo`:
            or in the ratio's mask), by `dro` all. Loss and gradient are the same to the bit.
        temperature: T > 0: log-probabilities, losses and gradients are those of softmax(z / T), z
            the base's logits. With the temperature that a policy was sampled at, its ratio to the
            sampler is 1.
        entropy: whether the entropy of softmax(z / T) comes back beside each log-probability.
        reference_kl: whether `data` and `config` may hold a policy's loss to a reference policy.
            Where a protocol has no such thing, False refuses its inputs and its setting by name.
    """

    adapter: str | None
    data: Sequence[Datum]
    loss: str = "cross_entropy"
    config: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True
    logprobs: Wanted = "all"
    temperature: float = 1.0
    entropy: bool = False
    snapshot: str | None = None
    reference_kl: bool = True
    tenant: str = ""
    seq: int = 0

    @property
    def called(self) -> str:
        """An error calls the weights of this operation so."""
        if self.snapshot is not None:
            return f"snapshot {self.snapshot!r}"
        return "the bare base" if self.adapter is None else f"adapter {self.adapter!r}"

    @property
    def num_tokens(self) -> int:
        return sum(len(datum) for datum in self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """An `OptimStep` makes one AdamW step on the accumulated gradients, and drops them."""

    adapter: str
    params: AdamParams
    tenant: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A `Sample` continues prompts with an adapter's weights, current or frozen in a snapshot.

    Attributes:
        adapter: the adapter in whose order the request stands; None = it stands in no order.
        prompts: token ids of each prompt.
        num_samples: continuations of each prompt; they differ in their random streams.
        snapshot: the frozen copy to use. Without it, the adapter's current weights, or the bare
            base if there is no adapter either.
        scoring: what to report beside the tokens.
    """

    adapter: str | None
    prompts: Sequence[Sequence[int] | Array]
    params: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    snapshot: str | None = None
    scoring: Scoring = field(default_factory=Scoring)
    tenant: str = ""

    @property
    def num_tokens(self) -> int:
        return self.num_samples * sum(
            len(prompt) + self.params.max_tokens for prompt in self.prompts
        )
