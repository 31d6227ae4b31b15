"""The decode loop takes requests and gives answers. M tokens of the prompt."""

from dataclasses import dataclass, field

from manylora.lora.adapter import AdapterWeights
from manylora.types import PromptScores, SampledSequence, SamplingParams, Scoring
from manylora.types.data import Array


@dataclass(slots=True, eq=False)
class Request:
    """A request is one prompt to continue; the same object comes back with its answer.

    Attributes:
        prompt: int64 [M], checked: 1 ≤ M < the loop's longest sequence.
        weights: not to be changed while the request is in the loop; None = the bare base.
        num_samples: how many continuations.
        tenant: who asks; tenants share the loop evenly.
        index: which prompt of its client's request; it has random streams of its own.
    """

    prompt: Array
    weights: AdapterWeights | None
    params: SamplingParams
    num_samples: int = 1
    scoring: Scoring = field(default_factory=Scoring)
    tenant: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer has the continuations in order, and scores if they were asked.

    `finite` is False if the logits had NaN or Inf; then there is nothing else.
    """

    sequences: tuple[SampledSequence, ...]
    scores: PromptScores | None
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Kinds:
    """A step has these kinds of work: read prompts, feed sequences, begin some that are read."""

    read: bool
    feed: bool
    begin: bool
