"""Prompts wait to be read or to be continued, until it is their turn.

A step reads at most so many tokens of prompts, a chunk of each at a time: a long prompt does not
stall those that are being continued. Where a prompt is cut depends on the prompt alone, so its
numbers do not depend on its neighbours. Tenants take turns, chunk by chunk.

Room is dealt by dynamic thresholds (https://doi.org/10.1109/90.664262): a tenant may hold at most
`ALPHA` times what would still be free, so that the next request finds room at once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from manylora.models.cache import Extent, blocks
from manylora.sampling.request import Request
from manylora.sampling.scoring import PromptScorer
from manylora.sampling.stops import StopStrings
from manylora.types import SampledSequence, TopK

# A tenant alone gets 7/8 of the room.
ALPHA = 7
# A prompt that has been without room for so many steps is served before all others.
PATIENCE = 256


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt is a request on its way through the loop.

    Attributes:
        limit: most new tokens of each continuation.
        read: tokens of the prompt that are in the cache.
        hidden_H: last hidden state of the prompt, once it is read.
        opened: continuations that have been given room.
        source: one of them that is still there; the next copies its beginning.
        done: those that have ended, by number.
        dropped: no client waits for it any more.
    """

    request: Request
    limit: int
    scorer: PromptScorer | None
    read: int = 0
    hidden_H: Tensor | None = None
    opened: int = 0
    source: Sequence | None = None
    done: dict[int, SampledSequence] = field(default_factory=dict)
    patience: int = PATIENCE
    dropped: bool = False

    @property
    def tokens(self) -> int:
        """One continuation may need this many tokens of the cache."""
        return len(self.request.prompt) + self.limit

    @property
    def unread(self) -> int:
        return len(self.request.prompt) - self.read

    @property
    def leaves(self) -> bool:
        """The prompt has nothing more to wait for."""
        return self.dropped or (not self.unread and self.opened == self.request.num_samples)


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence is one continuation that has room: it runs, or is about to.

    Attributes:
        number: which of its prompt's.
        slot: its place in the arrays.
        extent: its place in the cache.
        topk: of each new token, if asked.
    """

    prompt: Prompt
    number: int
    slot: int
    extent: Extent
    stops: StopStrings | None
    topk: list[TopK] | None


@dataclass(slots=True)
class _Held:
    rows: int = 0
    tokens: int = 0


class WaitingRoom:
    """The waiting room has prompts by tenant, and what each tenant holds of the loop's room."""

    def __init__(self, max_rows: int, max_tokens: int):
        self._free = _Held(max_rows, max_tokens)
        self._held: dict[str, _Held] = {}
        self._waiting: OrderedDict[str, deque[Prompt]] = OrderedDict()
        self._late: Prompt | None = None  # what becomes free is for this one

    def enter(self, prompt: Prompt) -> None:
        """Put a prompt behind its tenant's others; a tenant that has nothing here is next."""
        tenant = prompt.request.tenant
        if tenant not in self._waiting:
            self._waiting[tenant] = deque()
            self._waiting.move_to_end(tenant, last=tenant in self._held)
        self._waiting[tenant].append(prompt)

    def give_back(self, tenant: str, tokens: int) -> None:
        """Take back the room of a continuation that held so many tokens and has ended."""
        self._count(tenant, -1, -blocks(tokens))

    def tidy(self) -> None:
        """Forget the prompts that wait for nothing more."""
        for tenant, queue in list(self._waiting.items()):
            while queue and queue[0].leaves:
                queue.popleft()
            if not queue:
                del self._waiting[tenant]

    def plan(
        self, token_budget: int, chunk: int, begin: Callable[[Prompt], bool]
    ) -> list[tuple[Prompt, int]]:
        """Deal out a step's turns; return the prompts to read from, and how many tokens of each.
        `begin` makes room for one more continuation of a prompt; False if there is none."""
        plan: list[tuple[Prompt, int]] = []
        room = token_budget
        heads = (queue[0] for queue in self._waiting.values())
        self._late = next((prompt for prompt in heads if prompt.patience <= 0), None)
        queues = {tenant: iter(queue) for tenant, queue in self._waiting.items()}
        served: dict[str, None] = {}
        while queues:
            for tenant in list(queues):
                prompt = next(queues[tenant], None)
                tokens = 0 if prompt is None else min(chunk, prompt.unread)
                late = tokens > room and bool(plan)
                if prompt is None or late or not self._serve(prompt, begin):
                    del queues[tenant]
                    continue
                if tokens and not prompt.dropped:
                    plan.append((prompt, tokens))
                    room -= tokens
                served[tenant] = None
        # Who was served goes behind those who were not.
        for tenant in served:
            self._waiting.move_to_end(tenant)
        return plan

    def _serve(self, prompt: Prompt, begin: Callable[[Prompt], bool]) -> bool:
        """Make what room it needs; False if it has to wait, and its tenant's later ones with it."""
        if prompt.unread:
            return prompt.dropped or prompt.opened > 0 or self._begin(prompt, begin)
        while not prompt.leaves:
            if not self._begin(prompt, begin):
                return False
        return True

    def _begin(self, prompt: Prompt, begin: Callable[[Prompt], bool]) -> bool:
        if self._late not in (None, prompt):
            return False
        tenant, tokens = prompt.request.tenant, blocks(prompt.tokens)
        rows_left, tokens_left = self._free.rows - 1, self._free.tokens - tokens
        fits = rows_left >= 0 and tokens_left >= 0
        held = self._held.get(tenant)
        if fits and held is not None:
            within = held.rows < ALPHA * rows_left and held.tokens + tokens <= ALPHA * tokens_left
            if not within:
                return False
        if not fits or not begin(prompt):
            prompt.patience -= 1
            return False
        self._count(tenant, 1, tokens)
        return True

    def _count(self, tenant: str, rows: int, tokens: int) -> None:
        held = self._held.setdefault(tenant, _Held())
        held.rows, held.tokens = held.rows + rows, held.tokens + tokens
        self._free.rows, self._free.tokens = self._free.rows - rows, self._free.tokens - tokens
        if not held.rows:
            del self._held[tenant]
