"""The decode loop continues all tenants' sequences, each with its adapter, a token at a time.

A step reads a bounded number of prompt tokens, then feeds one token of every sequence that runs,
then chooses the next tokens of those and of the sequences that begin. Newcomers join, and who is
done leaves, between any two steps. A sequence's bits do not depend on who else is there:

- rows of products are padded to safe numbers (`sampling.rows`, and for prompts
  `models.stream.ROW_MULTIPLE`), and each row's low-rank products are its own (`kernels.rowwise`);
- attention reads as much of a sequence's cache as follows from its own length (`models.cache`);
- prompts are cut by their own length, and each is a segment of its own;
- random numbers are counted along each sequence.

S sequences, T rows of a stream, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from manylora.kernels import RowCounts
from manylora.lora.routing import RoutingTable, Segment, routing
from manylora.models import BaseModel, KVCache, PackedStream, packed
from manylora.models.cache import DecodeRows, DecodeStep, Extent, Filling
from manylora.models.stream import padded_rows
from manylora.sampling.draw import Choice, RowSettings, choose, stream_key, uniforms
from manylora.sampling.request import Answer, Kinds, Request
from manylora.sampling.scoring import PromptScorer, joined, likeliest, logits_rows
from manylora.sampling.slots import Slots
from manylora.sampling.step_rows import StepRows
from manylora.sampling.stops import StopStrings
from manylora.sampling.waiting import Prompt, Sequence, WaitingRoom
from manylora.types import SampledSequence, TopK
from manylora.types.data import Array

# Sequences that run at a time, and tokens that their cache may hold.
MAX_SEQUENCES = 256
MAX_CACHED_TOKENS = 1 << 16
# A prompt is read in pieces of this many tokens.
PREFILL_CHUNK = 512


@dataclass(slots=True)
class _Part:
    """A `_Part` is rows whose next tokens are chosen together; `watched`: with strings or top-k."""

    sequences: list[Sequence]
    watched: list[int]
    slots_S: Array
    table: RoutingTable
    settings: RowSettings


@dataclass(slots=True)
class _Batch:
    """A `_Batch` is the sequences that run, in stream order; it lasts until one joins or leaves."""

    sequences: list[Sequence]
    slots_S: Array
    table: RoutingTable
    rows: DecodeRows
    parts: list[_Part]


class DecodeLoop:
    """The loop is not thread-safe: the engine's thread alone turns it."""

    def __init__(
        self,
        base: BaseModel,
        *,
        token_budget: int = 4096,
        max_sequences: int = MAX_SEQUENCES,
        max_cached_tokens: int = MAX_CACHED_TOKENS,
    ):
        """Start with nothing to do.

        Args:
            token_budget: prompt tokens that one step reads at most.
            max_sequences: that run at a time; others wait.
            max_cached_tokens: of all that run, prompts and what they may become.
        """
        self._base = base
        self._token_budget = token_budget
        self._chunk = min(PREFILL_CHUNK, token_budget)
        self._cache = KVCache(max_cached_tokens)
        self._slots = Slots(max_sequences)
        self._room = WaitingRoom(max_sequences, self._cache.max_tokens)
        self._prompts: dict[Request, Prompt] = {}
        self._running: list[Sequence] = []
        self._beginning: list[Sequence] = []  # their prompt is read; the first token comes next
        self._batch: _Batch | None = None
        self._logits_rows = logits_rows(base.vocab_size)
        self.step_rows = StepRows(base, max(MAX_SEQUENCES, max_sequences), self._logits_rows)
        self._finished: list[tuple[Request, Answer]] = []

    @property
    def longest(self) -> int:
        """A sequence has at most this many tokens: the base's context, or what the cache holds."""
        return min(self._base.context_length, self._cache.max_tokens)

    def __len__(self) -> int:
        """Count the requests in the loop, those that wait for room or to be handed out included."""
        return len(self._prompts) + len(self._finished)

    def admit(self, requests: Iterable[Request]) -> None:
        """Let requests join at the next step."""
        for request in requests:
            limit = min(request.params.max_tokens, self.longest - len(request.prompt))
            scorer = PromptScorer(request) if request.scoring.of_prompt else None
            prompt = self._prompts[request] = Prompt(request, limit, scorer)
            self._room.enter(prompt)

    def cancel(self, request: Request) -> None:
        """Forget a request, if it is still here."""
        prompt = self._prompts.pop(request, None)
        if prompt is None:
            return
        prompt.dropped = True
        mine = [s for s in (*self._running, *self._beginning) if s.prompt is prompt]
        if prompt.unread and prompt.source is not None:
            mine.append(prompt.source)
        for sequence in mine:
            self._leave(sequence)
        self._room.tidy()

    def interrupt(self, request: Request) -> None:
        """End a request, if it is still here: the next step answers it with what it has."""
        prompt = self._prompts.get(request)
        if prompt is None:
            return
        for sequence in (*self._running, *self._beginning):
            if sequence.prompt is prompt:
                prompt.done[sequence.number] = self._sampled(sequence, "interrupted")
        most = request.scoring.topk_sampled
        unbegun = SampledSequence((), (), "interrupted", joined([], most) if most else None)
        for number in range(request.num_samples):
            prompt.done.setdefault(number, unbegun)
        self.cancel(request)
        self._finished.append((request, _answer(prompt)))

    @torch.no_grad()
    def step(self, agree: Callable[[Kinds], Kinds] | None = None) -> list[tuple[Request, Answer]]:
        """Read prompts, then make one token of every sequence.

        Args:
            agree: on a mesh, what any rank's loop does of what this one would do. Every rank does
                as many forwards, with nothing in them where it has nothing to do.

        Returns:
            The requests that are done.
        """
        chunks = self._room.plan(self._token_budget, self._chunk, self._open)
        kinds = Kinds(bool(chunks), bool(self._running), bool(self._beginning))
        if agree is not None:
            kinds = agree(kinds)
        if kinds.read or kinds.feed or kinds.begin:
            with self._base.head.gathered():
                self._step(chunks, kinds)
        self._room.tidy()
        finished = self._finished
        self._finished = []
        return finished

    def _step(self, chunks: list[tuple[Prompt, int]], kinds: Kinds) -> None:
        if kinds.read:
            self._read(chunks)
        hidden = [self._feed()] if self._running else []
        if kinds.feed and not hidden:
            self._base.run_nothing()
        begun = list(self._beginning)
        hidden += [s.prompt.hidden_H[None] for s in begun if s.prompt.hidden_H is not None]
        if hidden:
            self._take(torch.cat(hidden), begun)

    # -- joining and leaving --------------------------------------------------------------------

    def _open(self, prompt: Prompt, extent: Extent | None = None) -> bool:
        """Give a prompt's next continuation a slot and its place in the cache, if there is any;
        `extent` is one that holds the prompt already."""
        request, params = prompt.request, prompt.request.params
        if extent is None:
            extent = self._cache.allocate(prompt.tokens)
            if extent is None:
                return False
            if prompt.source is not None:
                self._cache.copy(prompt.source.extent, extent, len(request.prompt))
        key = stream_key(params.seed, request.index, prompt.opened)
        stops = self._base.eos_token_ids if params.stop is None else params.stop
        slot = self._slots.take(params, len(request.prompt), prompt.limit, stops, key)
        texts = params.stop_strings
        watch = StopStrings(self._base.tokenizer, texts) if texts else None
        topk: list[TopK] | None = [] if request.scoring.topk_sampled else None
        sequence = Sequence(prompt, prompt.opened, slot, extent, watch, topk)
        prompt.opened += 1
        if prompt.source is None:
            prompt.source = sequence
        if not prompt.unread:
            self._beginning.append(sequence)
        return True

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out. The source of some to come leaves the next its extent."""
        prompt = sequence.prompt
        if sequence in self._running:
            self._running.remove(sequence)
            self._batch = None
        elif sequence in self._beginning:
            self._beginning.remove(sequence)
        self._slots.release(sequence.slot)
        if prompt.source is sequence and not prompt.leaves:
            prompt.source = None
            self._open(prompt, sequence.extent)
            return
        self._cache.release(sequence.extent)
        self._room.give_back(prompt.request.tenant, prompt.tokens)

    def _end(self, sequence: Sequence, *, stopped: bool) -> None:
        """Complete a continuation, and perhaps its request."""
        prompt = sequence.prompt
        prompt.done[sequence.number] = self._sampled(sequence, "stop" if stopped else "length")
        self._leave(sequence)
        if len(prompt.done) == prompt.request.num_samples:
            del self._prompts[prompt.request]
            self._finished.append((prompt.request, _answer(prompt)))

    def _sampled(self, sequence: Sequence, reason: str) -> SampledSequence:
        slot, topk = sequence.slot, sequence.topk
        count = int(self._slots.generated[slot])
        return SampledSequence(
            tuple(self._slots.tokens[slot, :count].tolist()),
            tuple(self._slots.logprobs[slot, :count].tolist()),
            reason,
            None if topk is None else joined(topk, sequence.prompt.request.scoring.topk_sampled),
        )

    def _fail(self, prompt: Prompt) -> None:
        """End a request whose logits had NaN or Inf."""
        if not prompt.dropped:
            self.cancel(prompt.request)
            self._finished.append((prompt.request, Answer((), None, finite=False)))

    # -- reading prompts ------------------------------------------------------------------------

    def _read(self, chunks: list[tuple[Prompt, int]]) -> None:
        """Read the next tokens of some prompts."""
        if not chunks:
            self._base.run_nothing()
            return
        lengths = [tokens for _, tokens in chunks]
        kept = [prompt.read for prompt, _ in chunks]
        total = padded_rows(sum(lengths))
        tokens_T, positions_T = np.zeros(total, np.int64), np.zeros(total, np.int64)
        ends = np.cumsum(lengths)
        extents = []
        for (prompt, count), end in zip(chunks, ends, strict=True):
            places = np.arange(prompt.read, prompt.read + count)
            rows = slice(end - count, end)
            tokens_T[rows], positions_T[rows] = prompt.request.prompt[places], places
            assert prompt.source is not None
            extents.append(prompt.source.extent)
        segments = [Segment(count, prompt.request.weights) for prompt, count in chunks]
        segments.append(Segment(total - int(ends[-1]), None))
        stream = PackedStream(lengths, total, filling=Filling(self._cache, extents, kept))
        with routing(RoutingTable(segments, training=False)), packed(stream):
            hidden_TH = self._base.hidden(self._on_device(tokens_T), self._on_device(positions_T))
        for (prompt, count), end in zip(chunks, ends, strict=True):
            self._have_read(prompt, hidden_TH[end - count : end])

    def _have_read(self, prompt: Prompt, hidden_LH: Tensor) -> None:
        weights = prompt.request.weights
        if prompt.scorer is not None:

            def head(hidden_cH: Tensor) -> Tensor:
                segments = [Segment(len(hidden_cH), weights)]
                with routing(RoutingTable(segments, training=False)):
                    return self._base.logits(hidden_cH)

            prompt.scorer.take(prompt.read, hidden_LH, head, self._logits_rows)
        prompt.read += len(hidden_LH)
        if not prompt.unread:
            prompt.hidden_H = hidden_LH[-1].clone()
            assert prompt.source is not None
            self._beginning.append(prompt.source)
        if prompt.scorer is not None and not prompt.scorer.finite:
            self._fail(prompt)

    # -- decoding -------------------------------------------------------------------------------

    def _feed(self) -> Tensor:
        """Feed the last token of every running sequence; return their hidden states [S, H]."""
        batch = self._batch = self._batch or self._new_batch()
        slots, slots_S = self._slots, batch.slots_S
        count = len(slots_S)
        place_S = slots.generated[slots_S] - 1
        position_S = slots.prompt[slots_S] + place_S
        total = self.step_rows().hidden.holding(count)
        tokens_T, positions_T = np.zeros(total, np.int64), np.zeros(total, np.int64)
        tokens_T[:count] = slots.tokens[slots_S, place_S]
        positions_T[:count] = position_S
        stream = PackedStream([1] * count, total, decoding=DecodeStep(batch.rows, position_S))
        with routing(batch.table), packed(stream):
            hidden_TH = self._base.hidden(self._on_device(tokens_T), self._on_device(positions_T))
        return hidden_TH[:count]

    def _new_batch(self) -> _Batch:
        # Sorted by adapter, so that each is one segment of the stream; in an order that the other
        # ranks of a tensor-parallel group have too.
        order: dict[int, int] = {}
        for sequence in self._running:
            order.setdefault(id(sequence.prompt.request.weights), len(order))
        sequences = sorted(
            self._running, key=lambda s: (order[id(s.prompt.request.weights)], s.slot)
        )
        rows = DecodeRows(self._cache, [s.extent for s in sequences], self._base.device)
        slots_S = np.array([s.slot for s in sequences])
        parts = self._parts(sequences)
        table = self._table(sequences, self.step_rows().hidden)
        return _Batch(sequences, slots_S, table, rows, parts)

    def _table(self, sequences: list[Sequence], rows: RowCounts) -> RoutingTable:
        segments: list[Segment] = []
        for sequence in sequences:
            weights = sequence.prompt.request.weights
            if segments and segments[-1].weights is weights:
                segments[-1].rows += 1
            else:
                segments.append(Segment(1, weights))
        segments.append(Segment(rows.holding(len(sequences)) - len(sequences), None))
        # On other devices no bits are promised, and longer products are faster.
        by_row = self._base.device.type == "cpu"
        packed = self.step_rows().packed
        return RoutingTable(segments, training=False, by_row=by_row, packed=packed)

    def _parts(self, sequences: list[Sequence]) -> list[_Part]:
        parts = []
        rows = self.step_rows().logits
        for start in range(0, len(sequences), self._logits_rows):
            own = sequences[start : start + self._logits_rows]
            slots_S = np.array([s.slot for s in own])
            settings = RowSettings(
                self._slots.temperature[slots_S],
                self._slots.top_k[slots_S],
                self._slots.top_p[slots_S],
                rows,
                self._base.vocab_size,
                self._base.device,
            )
            watched = [row for row, s in enumerate(own) if s.stops or s.topk is not None]
            parts.append(_Part(own, watched, slots_S, self._table(own, rows), settings))
        return parts

    def _take(self, hidden_SH: Tensor, begun: list[Sequence]) -> None:
        """Choose the next token of every sequence; let those go that are done."""
        if begun:
            running = [] if self._batch is None else self._batch.sequences
            parts = self._parts([*running, *begun])
            self._running += begun
            self._beginning.clear()
            self._batch = None
        else:
            assert self._batch is not None
            parts = self._batch.parts
        start = 0
        for part in parts:
            self._take_part(part, hidden_SH[start : start + len(part.slots_S)])
            start += len(part.slots_S)

    def _take_part(self, part: _Part, hidden_SH: Tensor) -> None:
        slots, slots_S = self._slots, part.slots_S
        missing = self.step_rows().logits.holding(len(hidden_SH)) - len(hidden_SH)
        padded_TH = functional.pad(hidden_SH, (0, 0, 0, missing)) if missing else hidden_SH
        with routing(part.table):
            logits_TV = self._base.logits(padded_TH)
        draw_S = uniforms(slots.key[slots_S], slots.generated[slots_S])
        choice = choose(logits_TV, part.settings, draw_S)
        stopped_S, over_S = slots.note(slots_S, choice.tokens_S, choice.logprobs_S)
        for row in part.watched:
            self._watch(part.sequences[row], choice, row, stopped_S)
        lost_S = ~np.isfinite(choice.logprobs_S)
        for row in np.flatnonzero(stopped_S | over_S | lost_S):
            sequence = part.sequences[row]
            if lost_S[row]:
                self._fail(sequence.prompt)
            elif not sequence.prompt.dropped:
                self._end(sequence, stopped=bool(stopped_S[row]))

    def _watch(self, sequence: Sequence, choice: Choice, row: int, stopped_S: Array) -> None:
        """Look for stop strings and likeliest tokens, a cost of the sequence at every token."""
        if sequence.stops is not None and sequence.stops.ends_with(int(choice.tokens_S[row])):
            stopped_S[row] = True
        if sequence.topk is not None:
            logprobs_1V = (choice.scaled_TV[row] - choice.norm_T1[row])[None]
            count = sequence.prompt.request.scoring.topk_sampled
            sequence.topk.append(likeliest(logprobs_1V, count))

    def _on_device(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self._base.device, non_blocking=True)


def _answer(prompt: Prompt) -> Answer:
    """Put the answer to a request together, all of whose continuations have ended."""
    sequences = tuple(prompt.done[number] for number in range(len(prompt.done)))
    return Answer(sequences, None if prompt.scorer is None else prompt.scorer.scores())
