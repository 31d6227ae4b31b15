"""What a client can ask of an adapter, as the scheduler queues it and the engine runs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from manylora.types.adapter import AdamParams
from manylora.types.data import Array, Datum, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward:
    """Loss and log-probabilities of `data`; gradients too, unless `backward` is False.

    Gradients add up over any number of calls until the adapter's own optimizer step.
    """

    adapter: str
    data: Sequence[Datum]
    loss: str = "cross_entropy"
    config: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True

    @property
    def num_tokens(self) -> int:
        return sum(len(datum) for datum in self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """One AdamW step on the gradients that were accumulated, which are then dropped."""

    adapter: str
    params: AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Continue prompts with an adapter's weights as they are now.

    Attributes:
        adapter: None = the bare base.
        prompts: token ids of each prompt; every prompt is continued once.
        snapshot: use this frozen copy instead of the adapter's current weights.
    """

    adapter: str | None
    prompts: Sequence[Sequence[int] | Array]
    params: SamplingParams = field(default_factory=SamplingParams)
    snapshot: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt) + self.params.max_tokens for prompt in self.prompts)
