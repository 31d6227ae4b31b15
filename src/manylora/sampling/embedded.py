"""The embedded sampler: many prompts, each with its own adapter, in one decode loop.

A packed prefill fills the key-value cache; then every step feeds one new token of each sequence
that goes on. Finished sequences leave the batch.

S sequences, T rows of the stream, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manylora.lora.adapter import AdapterWeights
from manylora.lora.routing import RoutingTable, Segment, routing
from manylora.models import BaseModel, KVCache, PackedStream, packed
from manylora.models.stream import padded_rows
from manylora.types import SampledSequence, SamplingParams

# Sequences of one decode loop, and tokens that its cache may hold.
MAX_SEQUENCES = 256
MAX_CACHED_TOKENS = 1 << 16


@dataclass(slots=True)
class Request:
    """One prompt to continue; `owner` and `index` tell whose, and which of the owner's."""

    owner: int
    prompt: list[int]
    weights: AdapterWeights | None
    params: SamplingParams
    index: int


@dataclass(slots=True)
class _Sequence:
    request: Request
    limit: int
    stop: frozenset[int]
    draws: Tensor
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def going(self) -> bool:
        return not self.stopped and len(self.tokens) < self.limit

    def result(self) -> SampledSequence:
        reason = "stop" if self.stopped else "length"
        return SampledSequence(tuple(self.tokens), tuple(self.logprobs), reason)


@torch.no_grad()
def generate(base: BaseModel, requests: Sequence[Request]) -> list[SampledSequence]:
    """Continue every prompt; results are in the order of `requests`."""
    # Sorted by adapter, so that a segment of the stream is an adapter.
    order = sorted(range(len(requests)), key=lambda i: id(requests[i].weights))
    sequences = {i: _open(base, requests[i]) for i in order}
    for batch in _batches([sequences[i] for i in order]):
        _decode(base, batch)
    return [sequences[i].result() for i in range(len(requests))]


def _open(base: BaseModel, request: Request) -> _Sequence:
    params = request.params
    limit = min(params.max_tokens, base.context_length - len(request.prompt))
    stop = frozenset(base.eos_token_ids if params.stop is None else params.stop)
    generator = torch.Generator().manual_seed(
        (params.seed * 1_000_003 + request.index) & ((1 << 63) - 1)
    )
    return _Sequence(
        request, limit, stop, torch.rand(limit, generator=generator, dtype=torch.float64)
    )


def _batches(sequences: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
    batch: list[_Sequence] = []
    longest = 0
    for sequence in sequences:
        length = len(sequence.request.prompt) + sequence.limit
        longest_if = max(longest, length)
        if batch and (
            len(batch) == MAX_SEQUENCES or longest_if * (len(batch) + 1) > MAX_CACHED_TOKENS
        ):
            yield batch
            batch = list[_Sequence]()
            longest_if = length
        batch.append(sequence)
        longest = longest_if
    if batch:
        yield batch


def _decode(base: BaseModel, batch: list[_Sequence]) -> None:
    """One prefill, then one token of each sequence at a time."""
    longest = max(len(s.request.prompt) + s.limit for s in batch)
    cache = KVCache(len(batch), longest)
    lengths = [len(s.request.prompt) for s in batch]
    tokens = [token for s in batch for token in s.request.prompt]
    positions = [p for length in lengths for p in range(length)]
    stream = PackedStream(lengths, padded_rows(len(tokens)), cache)
    hidden_TH = _forward(base, stream, tokens, positions, batch, lengths)
    last = torch.tensor(lengths, device=base.device).cumsum(0) - 1
    _take(base, hidden_TH[last], batch)
    while True:
        going = [row for row, s in enumerate(batch) if s.going]
        if not going:
            return
        if len(going) < len(batch):
            cache.keep(torch.tensor(going, device=base.device))
            batch = [batch[row] for row in going]
        ones = [1] * len(batch)
        places = [len(s.request.prompt) + len(s.tokens) - 1 for s in batch]
        stream = PackedStream(
            ones, padded_rows(len(batch)), cache, True, torch.tensor(places, device=base.device)
        )
        hidden_TH = _forward(base, stream, [s.tokens[-1] for s in batch], places, batch, ones)
        _take(base, hidden_TH[: len(batch)], batch)


def _forward(
    base: BaseModel,
    stream: PackedStream,
    tokens: list[int],
    positions: list[int],
    batch: Sequence[_Sequence],
    rows: Sequence[int],
) -> Tensor:
    padding = [0] * (stream.total - len(tokens))
    table = RoutingTable(_segments(batch, rows, len(padding)), training=False)
    with routing(table), packed(stream):
        return base.hidden(
            torch.tensor(tokens + padding, device=base.device),
            torch.tensor(positions + padding, device=base.device),
        )


def _segments(batch: Sequence[_Sequence], rows: Sequence[int], padding: int) -> list[Segment]:
    segments: list[Segment] = []
    for sequence, count in zip(batch, rows, strict=True):
        weights = sequence.request.weights
        if segments and segments[-1].weights is weights:
            segments[-1].rows += count
        else:
            segments.append(Segment(count, weights))
    return [*segments, Segment(padding, None)]


def _take(base: BaseModel, hidden_SH: Tensor, batch: Sequence[_Sequence]) -> None:
    """Choose the next token of every sequence and note it."""
    logits_SV = _logits(base, hidden_SH, batch)
    temperature_S1 = torch.tensor(
        [[s.request.params.temperature] for s in batch], device=logits_SV.device
    )
    greedy_S1 = temperature_S1 == 0.0
    logprobs_SV = torch.log_softmax(
        logits_SV / torch.where(greedy_S1, torch.ones_like(temperature_S1), temperature_S1), dim=-1
    )
    chosen_S = logits_SV.argmax(dim=-1)
    rows = [row for row, s in enumerate(batch) if s.request.params.temperature > 0.0]
    if rows:
        chosen_S[rows] = _draw(logprobs_SV[rows], [batch[row] for row in rows])
    picked = logprobs_SV.gather(1, chosen_S.unsqueeze(1)).squeeze(1).tolist()
    for sequence, token, logprob in zip(batch, chosen_S.tolist(), picked, strict=True):
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        sequence.stopped = token in sequence.stop


def _logits(base: BaseModel, hidden_SH: Tensor, batch: Sequence[_Sequence]) -> Tensor:
    """Logits [S, V] with each sequence's own adapter on the head, if it has one."""
    padding = padded_rows(len(batch)) - len(batch)
    table = RoutingTable(_segments(batch, [1] * len(batch), padding), training=False)
    with routing(table):
        padded_SH = torch.cat([hidden_SH, hidden_SH.new_zeros(padding, hidden_SH.shape[1])])
        return base.logits(padded_SH)[: len(batch)]


def _draw(logprobs_SV: Tensor, batch: Sequence[_Sequence]) -> Tensor:
    """One token of each row by its sequence's own next random number, after top-k and top-p."""
    values_SV, tokens_SV = logprobs_SV.double().sort(dim=-1, descending=True, stable=True)
    probs_SV = values_SV.exp()
    vocab = probs_SV.shape[1]
    rank_V = torch.arange(vocab, device=probs_SV.device)
    top_k_S1 = torch.tensor(
        [[s.request.params.top_k or vocab] for s in batch], device=probs_SV.device
    )
    top_p_S1 = torch.tensor([[s.request.params.top_p] for s in batch], device=probs_SV.device)
    before_SV = probs_SV.cumsum(-1) - probs_SV
    probs_SV = probs_SV * ((rank_V < top_k_S1) & ((before_SV < top_p_S1) | (rank_V == 0)))
    cumulative_SV = probs_SV.cumsum(-1)
    draw_S1 = torch.tensor(
        [[float(s.draws[len(s.tokens)])] for s in batch],
        device=probs_SV.device,
        dtype=torch.float64,
    )
    place_S1 = (cumulative_SV <= draw_S1 * cumulative_SV[:, -1:]).sum(-1, keepdim=True)
    return tokens_SV.gather(1, place_S1.clamp_max(vocab - 1)).squeeze(1)
