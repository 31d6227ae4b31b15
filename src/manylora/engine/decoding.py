"""The engine's sampling verbs take requests of many prompts to the decode loop of single ones."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from manylora.engine.admission import admit_sample
from manylora.engine.host_memory import FreeMemory
from manylora.lora.adapter import AdapterWeights
from manylora.models import BaseModel
from manylora.sampling import Answer, DecodeLoop, LoopsTogether, Request
from manylora.types import (
    DataError,
    DatumTooLong,
    ManyloraError,
    NotFinite,
    Sample,
    SampleResult,
    Unsupported,
)
from manylora.types.data import Array


@dataclass(slots=True, eq=False)
class _Open:
    """An `_Open` is a request in the loop, with the answers to its prompts so far."""

    sample: Sample
    requests: list[Request]
    answers: dict[Request, Answer] = field(default_factory=dict)


class Decoder:
    """A decoder admits requests, turns the loop, and puts the answers together.

    An adapter's weights must not change while a request that uses them is here; the scheduler sees
    to it. Its weights are resolved at admission, so it, or its snapshot, may be forgotten.
    """

    def __init__(
        self,
        base: BaseModel,
        loop: DecodeLoop,
        weights_of: Callable[[Sample], AdapterWeights | None],
        most_tokens: int | None = None,
    ):
        """Stand before a loop.

        `weights_of` tells what a request is to be answered with, or raises AdapterNotFound;
        `most_tokens` bounds a sequence where memory does (see `admit_sample`).
        """
        self.base = base
        self.loop = loop
        self._together: LoopsTogether | None = None
        self._queue: DecodeLoop | LoopsTogether = loop
        if base.mesh.shape.size > 1:
            self._queue = self._together = LoopsTogether(loop, base.mesh, base.device)
        self._weights_of = weights_of
        self._most_tokens = most_tokens
        self._memory = FreeMemory(torch.device("cpu"))
        self._open: dict[Request, _Open] = {}
        self._whole: list[_Open] = []
        self._ready: list[tuple[Sample, SampleResult | ManyloraError]] = []

    @property
    def decoding(self) -> int:
        """This many requests are not finished."""
        return len(self._whole) + len(self._ready)

    @property
    def promised_bytes(self) -> int:
        """The first sampling will take this many bytes beside the cache and the answers."""
        return self.loop.step_rows.promised_bytes

    def admit(self, samples: Sequence[Sample]) -> list[ManyloraError | None]:
        """Let requests join the loop; return for each None, or why it did not: DataError,
        DatumTooLong, DoesNotFit, AdapterNotFound, Unsupported."""
        return [self._admit(sample) for sample in samples]

    def decode(self, seconds: float) -> list[tuple[Sample, SampleResult | ManyloraError]]:
        """Turn the loop for about so long, or until a request is finished; return those that are,
        each with its result, or NotFinite (weights that have run away)."""
        until = time.monotonic() + seconds
        while self._together is not None and self._whole and not self._ready:
            answered, time_is_up = self._together.turn(until)
            for request, answer in answered:
                self._take(request, answer)
            if time_is_up:
                break
        while self._together is None and len(self.loop):
            for request, answer in self.loop.step():
                self._take(request, answer)
            if self._ready or time.monotonic() >= until:
                break
        ready = self._ready
        self._ready = []
        return ready

    def sample(self, samples: Sequence[Sample]) -> list[SampleResult | ManyloraError]:
        """Admit requests and decode until all are finished; nothing else may be decoding."""
        assert not self.decoding, "other requests are decoding"
        found: dict[int, SampleResult | ManyloraError] = {}
        outcomes = self.admit(samples)
        while self.decoding:
            # By identity: equal requests have equal answers.
            found.update((id(sample), result) for sample, result in self.decode(1.0))
        return [error or found[id(s)] for error, s in zip(outcomes, samples, strict=True)]

    def cancel(self, sample: Sample) -> None:
        """Drop a request, if it is still here."""
        for entry in self._whole:
            if entry.sample is sample:
                self._close(entry)
                return

    def interrupt(self, sample: Sample) -> None:
        """End a request, if it is still here; `decode` gives it with what was sampled until now."""
        for entry in self._whole:
            if entry.sample is sample:
                for request in entry.requests:
                    self._queue.interrupt(request)
                return

    def _admit(self, sample: Sample) -> ManyloraError | None:
        try:
            weights = self._weights_of(sample)
            self._check(sample)
            admit_sample(sample, self.base, self._most_tokens, self.promised_bytes, self._memory)
            asked = (sample.params, sample.num_samples, sample.scoring, sample.tenant)
            requests = [
                Request(self._prompt(prompt), weights, *asked, index)
                for index, prompt in enumerate(sample.prompts)
            ]
            _check_candidates(sample, requests, self.base.vocab_size)
        except ManyloraError as error:
            return error
        entry = _Open(sample, requests)
        if not requests:
            self._ready.append((sample, SampleResult(())))
            return None
        self._whole.append(entry)
        self._open.update(dict.fromkeys(requests, entry))
        self._queue.admit(requests)
        return None

    def _take(self, request: Request, answer: Answer) -> None:
        entry = self._open.get(request)
        if entry is None:
            return
        if not answer.finite:
            self._close(entry)
            name = entry.sample.snapshot or entry.sample.adapter or self.base.name
            error = NotFinite(f"{name!r}: the logits have NaN or Inf")
            self._ready.append((entry.sample, error))
            return
        entry.answers[request] = answer
        if len(entry.answers) == len(entry.requests):
            self._close(entry)
            answers = [entry.answers[r] for r in entry.requests]
            self._ready.append((entry.sample, _result(answers)))

    def _close(self, entry: _Open) -> None:
        self._whole.remove(entry)
        for request in entry.requests:
            del self._open[request]
            self._queue.cancel(request)

    def _check(self, sample: Sample) -> None:
        scoring = sample.scoring
        if sample.num_samples < 1:
            raise DataError(f"num_samples is {sample.num_samples}; it must be ≥ 1")
        for name in ("topk_prompt", "topk_sampled"):
            if not 0 <= getattr(scoring, name) <= self.base.vocab_size:
                raise DataError(
                    f"{name} is {getattr(scoring, name)}; it must lie in 0 … "
                    f"{self.base.vocab_size}, the size of the vocabulary"
                )
        if scoring.prompt_last_n is not None and scoring.prompt_last_n < 0:
            raise DataError(f"prompt_last_n is {scoring.prompt_last_n}; it must be ≥ 0")
        if sample.params.stop_strings and self.base.tokenizer is None:
            raise Unsupported(
                f"base {self.base.name!r} has no tokenizer, so stop strings cannot be seen; "
                "give stop tokens"
            )

    def _prompt(self, prompt: Iterable[int]) -> Array:
        tokens_M = np.asarray(list(prompt) if not isinstance(prompt, np.ndarray) else prompt)
        if tokens_M.ndim != 1 or not len(tokens_M):
            raise DataError("a prompt needs at least one token")
        if tokens_M.dtype.kind not in "iu":
            raise DataError(f"a prompt's tokens are {tokens_M.dtype}; they must be integers")
        if len(tokens_M) >= self.loop.longest:
            raise DatumTooLong(
                f"a prompt of {len(tokens_M)} tokens leaves no room in a context of "
                f"{self.loop.longest}"
            )
        if tokens_M.min() < 0 or tokens_M.max() >= self.base.vocab_size:
            raise DataError(f"a prompt has token ids outside 0 … {self.base.vocab_size - 1}")
        return tokens_M.astype(np.int64)


def _check_candidates(sample: Sample, requests: Sequence[Request], vocab: int) -> None:
    candidates = sample.scoring.candidates
    if candidates is None:
        return
    for request in requests:
        if candidates.ndim != 2 or len(candidates) != len(request.prompt) - 1:
            raise DataError(
                f"candidates have shape {candidates.shape}; a prompt of {len(request.prompt)} "
                f"tokens needs [{len(request.prompt) - 1}, any]"
            )
    if candidates.dtype.kind not in "iu" or (
        candidates.size and (candidates.min() < -1 or candidates.max() >= vocab)
    ):
        raise DataError(f"candidates must be token ids of 0 … {vocab - 1}, or -1")


def _result(answers: Sequence[Answer]) -> SampleResult:
    sequences = tuple(sequence for answer in answers for sequence in answer.sequences)
    scores = tuple(answer.scores for answer in answers if answer.scores is not None)
    return SampleResult(sequences, scores)
