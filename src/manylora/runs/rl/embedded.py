"""The embedded sampler is the decode loop of the engine that trains, so its bits are exact."""

import asyncio
import time
from asyncio import wrap_future
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from manylora.servers import Policy, Published, ServerState, Turn, Weights
from manylora.types import AdapterNotFound, SamplingParams, Scoring
from manylora.types.data import Array


class EmbeddedSampler:
    """An `EmbeddedSampler` samples frozen copies of weights in the process that trains them."""

    def __init__(self) -> None:
        """Nothing is published yet."""
        self._weights: dict[Policy, Weights] = {}
        self._running: Counter[Policy] = Counter()
        self._idle = asyncio.Condition()

    async def publish(self, adapter: str, version: int, weights: Weights) -> Published:
        """See `Sampler.publish`; requests of it stand behind the copy in the engine's queue."""
        began = time.perf_counter()
        policy = Policy(adapter, "", version)
        self._weights.setdefault(policy, weights)
        return Published(policy, time.perf_counter() - began)

    async def generate(
        self, policy: Policy, ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Turn:
        """See `Sampler.generate`; a caller that is cancelled takes the request with it."""
        result = await self._ask(policy, ids, replace(params, seed=seed), Scoring())
        (found,) = result.sequences
        return Turn(found.tokens, found.logprobs, policy.version, found.stop_reason, result.device)

    async def score(self, policy: Policy, ids: Sequence[int]) -> Array:
        """See `Sampler.score`."""
        result = await self._ask(policy, ids, SamplingParams(max_tokens=1), Scoring(prompt=True))
        logprobs: Array = result.prompts[0].logprobs[1:]
        return logprobs

    async def interrupt(self, adapter: str) -> None:
        """See `Sampler.interrupt`."""
        newest = max(
            (policy for policy in self._weights if policy.adapter == adapter),
            key=lambda policy: policy.version,
            default=None,
        )
        if newest is not None:
            await wrap_future(self._weights[newest].interrupt())

    async def retire(self, policy: Policy) -> None:
        """See `Sampler.retire`."""
        async with self._idle:
            await self._idle.wait_for(lambda: not self._running[policy])
        self._weights.pop(policy, None)

    async def health(self) -> list[ServerState]:
        """See `Sampler.health`."""
        return [ServerState("", True, tuple(self._weights), self._running.total())]

    async def close(self) -> None:
        """See `Sampler.close`."""
        for policy in tuple(self._weights):
            await self.retire(policy)

    async def _ask(
        self, policy: Policy, ids: Sequence[int], params: SamplingParams, scoring: Scoring
    ) -> Any:
        weights = self._weights.get(policy)
        if weights is None:
            raise AdapterNotFound(
                f"adapter {policy.adapter!r}: version {policy.version} is not published"
            )
        request = wrap_future(weights.sample([list(ids)], params, scoring=scoring))
        self._running[policy] += 1
        try:
            return await request
        finally:
            async with self._idle:
                self._running[policy] -= 1
                self._idle.notify_all()
