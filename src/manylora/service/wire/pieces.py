"""The hub gets requests of the two big routes decoded, instead of bytes.

Shapes: N tokens of a datum, M tokens of a prompt, C candidates of a prompt token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from manylora.types import Datum, SamplingParams, Scoring
from manylora.types.data import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardSubmit:
    """A `ForwardBackwardSubmit` is a decoded forward_backward (or forward).

    Attributes:
        model_id, seq_id: whose it is, and its place in that order.
        data, loss, config: as `types.ForwardBackward` takes them.
        forward_only: no gradients.
        body: the bytes that came; decoding them again gives an equal submit (for a journal).
        digest: equal for equal content, however the bytes were laid out.
    """

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss: str
    config: Mapping[str, float]
    forward_only: bool
    body: bytes = field(repr=False)
    digest: str

    @property
    def num_tokens(self) -> int:
        return sum(len(datum) for datum in self.data)


@dataclass(frozen=True, slots=True)
class CSR:
    """A `CSR` places a sparse matrix's entries: `crow` int64 [rows + 1], `col` int64 [entries]."""

    crow: Array
    col: Array
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A `Wanted` is what the answer to a sample must repeat of the question.

    Attributes:
        prompt_logprobs: log-probabilities of the prompt's own tokens were asked.
        candidates: int64 [M - 1, C] as asked, dense; a cell of -1 asks nothing.
        csr: the layout that the candidates came in, if it was a sparse one.
    """

    prompt_logprobs: bool = False
    candidates: Array | None = None
    csr: CSR | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSubmit:
    """A `SampleSubmit` is a decoded asample.

    Attributes:
        sampling_session_id: which sampler.
        seq_id: the client's number for this request.
        prompt: int64 [M].
        max_tokens: None = up to the end of the context.
        seed: None = the hub's choice.
        temperature, top_k, top_p, stop, stop_strings: as in `types.SamplingParams`.
        scoring: as `types.Sample` takes it.
        wanted: for `sample_messages.encode_sample`.
        packed: candidates of the prompt that are still in the sparse form in which they came;
            `sample_messages.unpack` puts them into `scoring` and `wanted`.
        body, digest: as in `ForwardBackwardSubmit`, but the body is JSON.
    """

    sampling_session_id: str
    seq_id: int
    prompt: Array
    num_samples: int
    max_tokens: int | None
    seed: int | None
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[int, ...] | None
    stop_strings: tuple[str, ...]
    scoring: Scoring
    wanted: Wanted
    body: bytes = field(repr=False)
    digest: str
    packed: tuple[CSR, Array] | None = None

    @property
    def decoded_bytes(self) -> int:
        """Its arrays take so many bytes, unpacked."""
        cells = 0 if self.wanted.candidates is None else self.wanted.candidates.size
        if self.packed is not None:
            rows, columns = self.packed[0].shape
            cells = rows * columns
        return self.prompt.nbytes + 8 * cells

    def params(self, *, room: int, seed: int) -> SamplingParams:
        """Return the sampling settings, once the hub has filled in what the client left open.
        `room` is how many tokens the context has left: more than that are never made, so they are
        neither asked for nor counted."""
        return SamplingParams(
            max_tokens=room if self.max_tokens is None else min(self.max_tokens, room),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop,
            stop_strings=self.stop_strings,
            seed=seed if self.seed is None else self.seed,
        )
