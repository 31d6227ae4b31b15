"""What a client can ask of an adapter, as the scheduler queues it and the engine runs it.

Every operation says whose it is (`tenant`, for fairness) and, where the client numbers its
operations, which one it is (`seq`, for knowing what a saved state contains).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from manylora.types.adapter_spec import AdamParams
from manylora.types.data import Array, Datum
from manylora.types.sampling import SamplingParams, Scoring

# Whose log-probabilities an operation wants: every position's, or only the trained ones'.
Wanted = Literal["all", "trained"]
WANTED: tuple[Wanted, ...] = get_args(Wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward:
    """Loss and log-probabilities of `data`; gradients too, unless `backward` is False.

    Gradients add up over any number of calls until the adapter's own optimizer step.

    Attributes:
        logprobs: which log-probabilities come back. With "trained" the output head, a large part
            of a model with many words, runs on the trained positions only: by `cross_entropy` those
            with a weight that is not 0, by the policy losses those with such an advantage (`gspo`:
            or in the ratio's mask), by `dro` all. Loss and gradient are the same to the bit.
    """

    adapter: str
    data: Sequence[Datum]
    loss: str = "cross_entropy"
    config: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True
    logprobs: Wanted = "all"
    tenant: str = ""
    seq: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(datum) for datum in self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """One AdamW step on the gradients that were accumulated, which are then dropped."""

    adapter: str
    params: AdamParams
    tenant: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Continue prompts with an adapter's weights as they are now, or as a snapshot froze them.

    Attributes:
        adapter: in whose order the request stands; None = in nobody's.
        prompts: token ids of each prompt.
        num_samples: continuations of each prompt; they differ in their random streams.
        snapshot: use this frozen copy. Without it, the adapter's current weights, or the bare
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
