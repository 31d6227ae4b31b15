"""All running sequences' numbers lie side by side in arrays, so that no step loops over them.

A sequence keeps its slot from its start to its end; a step takes the slots of those that run.
"""

from collections.abc import Sequence

import numpy as np

from manylora.types import SamplingParams
from manylora.types.data import Array

NO_STOP = -1


class Slots:
    """`Slots` are arrays of `count` slots.

    Attributes:
        prompt: tokens of the prompt.
        generated: tokens made so far.
        limit: tokens to be made at most.
        key: where the random stream begins.
        temperature, top_k, top_p: as in `SamplingParams`.
        tokens: [slot, number of the new token].
        logprobs: of the tokens.
        stops: [slot, any], filled up with NO_STOP.
    """

    def __init__(self, count: int):
        self._free = list(range(count))[::-1]
        self.prompt, self.generated, self.limit = (np.zeros(count, np.int64) for _ in range(3))
        self.key = np.zeros(count, np.uint64)
        self.temperature = np.zeros(count, np.float32)
        self.top_k = np.zeros(count, np.int64)
        self.top_p = np.ones(count, np.float64)
        self.tokens = np.zeros((count, 0), np.int64)
        self.logprobs = np.zeros((count, 0), np.float32)
        self.stops = np.full((count, 1), NO_STOP, np.int64)

    def take(
        self, params: SamplingParams, prompt: int, limit: int, stops: Sequence[int], key: int
    ) -> int:
        """Return a free slot, set up for a new sequence."""
        slot = self._free.pop()
        self.prompt[slot], self.generated[slot], self.limit[slot] = prompt, 0, limit
        self.key[slot] = key
        self.temperature[slot] = params.temperature
        self.top_k[slot], self.top_p[slot] = params.top_k, params.top_p
        self.tokens = _widened(self.tokens, limit, 0)
        self.logprobs = _widened(self.logprobs, limit, 0)
        self.stops = _widened(self.stops, len(stops), NO_STOP)
        self.stops[slot] = NO_STOP
        self.stops[slot, : len(stops)] = list(stops)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; the narrowest arrays do again when all are free."""
        self._free.append(slot)
        if len(self._free) == len(self.prompt):
            count = len(self.prompt)
            self.tokens, self.logprobs = self.tokens[:, :0].copy(), self.logprobs[:, :0].copy()
            self.stops = np.full((count, 1), NO_STOP, np.int64)

    def note(self, slots_S: Array, tokens_S: Array, logprobs_S: Array) -> tuple[Array, Array]:
        """Note each sequence's next token; return bool [S] each: whether it is one of the
        sequence's stop tokens; whether the sequence has reached its limit."""
        place_S = self.generated[slots_S]
        self.tokens[slots_S, place_S] = tokens_S
        self.logprobs[slots_S, place_S] = logprobs_S
        self.generated[slots_S] = place_S + 1
        stopped_S = (self.stops[slots_S] == tokens_S[:, None]).any(axis=1)
        return stopped_S, place_S + 1 >= self.limit[slots_S]


def _widened(array: Array, width: int, fill: int) -> Array:
    """Return at least `width` columns; they double, so that it happens seldom."""
    count, now = array.shape
    if width <= now:
        return array
    shape = (count, max(width, 2 * now))
    # Zeros cost no memory until they are written.
    wide = np.full(shape, fill, array.dtype) if fill else np.zeros(shape, array.dtype)
    wide[:, :now] = array
    return wide
