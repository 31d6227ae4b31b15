"""These parameters say how to continue a prompt, and these results what was sampled.

Shapes: M tokens of a prompt, n new tokens; of a position, k likeliest tokens and C candidates.
"""

from dataclasses import dataclass, field

from manylora.types.data import Array, DeviceTime
from manylora.types.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """`SamplingParams` say how to continue a prompt.

    Attributes:
        max_tokens: at most this many new tokens, ≥ 1.
        temperature: 0 = greedy.
        top_k: keep the k likeliest tokens; 0 = all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this.
        stop: token ids that end the answer (returned as its last token). None = the model's own
            end-of-sequence tokens; `()` = never.
        stop_strings: texts that end the answer once it contains one of them; the tokens that
            complete it are returned.
        seed: the same seed, adapter and prompt give the same answer.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise DataError(f"max_tokens is {self.max_tokens}; it must be ≥ 1")
        if not self.temperature >= 0.0:
            raise DataError(f"temperature is {self.temperature}; it must be ≥ 0")
        if self.top_k < 0:
            raise DataError(f"top_k is {self.top_k}; it must be ≥ 0")
        if not 0.0 < self.top_p <= 1.0:
            raise DataError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if "" in self.stop_strings:
            raise DataError("a stop string is empty; it would end every answer at once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """A `Scoring` says what to report beside the answer's tokens and their log-probabilities.

    Attributes:
        prompt: report the log-probability of each prompt token.
        prompt_last_n: score only this many tokens at the prompt's end; None = all.
        topk_prompt: the k likeliest tokens at each scored prompt token; 0 = none.
        topk_sampled: the k likeliest tokens at each new token; 0 = none.
        candidates: int64 [M - 1, C], token ids whose log-probability is wanted at prompt tokens
            1 … M - 1; -1 asks for nothing.
    """

    prompt: bool = False
    prompt_last_n: int | None = None
    topk_prompt: int = 0
    topk_sampled: int = 0
    candidates: Array | None = None

    @property
    def of_prompt(self) -> bool:
        """The request asks for something about the prompt's own tokens."""
        return self.prompt or self.topk_prompt > 0 or self.candidates is not None


@dataclass(frozen=True, slots=True)
class TopK:
    """A `TopK` holds the likeliest tokens of some positions, best first.

    Attributes:
        tokens: int32 [positions, k].
        logprobs: float32 [positions, k].
    """

    tokens: Array
    logprobs: Array


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """A `SampledSequence` is one continuation of a prompt.

    Attributes:
        tokens: the new tokens, a stop token included.
        logprobs: log-probability of each new token under the (temperature-scaled, untruncated)
            distribution that it was drawn from; at temperature 0, under temperature 1.
        stop_reason: `stop` (a stop token or string), `length` (max_tokens or the context's end), or
            `interrupted`: it was ended from outside, and is the beginning, to the bit, of what it
            would have become; it has no token if it had not begun.
        topk: likeliest tokens at each new token, if asked.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: str
    topk: TopK | None = None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """`PromptScores` say how likely the model finds a prompt's own tokens, at temperature 1.

    Attributes:
        logprobs: float32 [M]; NaN where nothing was asked, and for the first token.
        topk: likeliest tokens at every prompt token ([M, k]; rows without a score are token 0 at
            -99999.0), if asked.
        candidates: float32 [M - 1, C], NaN where the request had -1; None if not asked.
    """

    logprobs: Array
    topk: TopK | None = None
    candidates: Array | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """A `SampleResult` is what a sampling request returns.

    Attributes:
        sequences: `num_samples` continuations of the first prompt, then of the second, …
        prompts: scores of each prompt if anything about it was asked, else empty. What had not been
            read of a prompt when its request was interrupted is NaN; there are no scores if
            nothing had been.
        device: what it cost; two results are compared without it.
    """

    sequences: tuple[SampledSequence, ...]
    prompts: tuple[PromptScores, ...] = ()
    device: DeviceTime = field(default=DeviceTime(), compare=False)
