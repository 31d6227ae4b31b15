"""A sampler without a model, and small makers, for the tests of rewards and hooks."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manylora.config import AdapterEntry
from manylora.config.rl import RewardUse
from manylora.models.vocabulary import Vocabulary
from manylora.runs.encode import Encoder
from manylora.runs.rl.hooks import play_rollout
from manylora.runs.rl.play_client import PlayClient, PlaySettings
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.user_threads import UserThreads
from manylora.servers.sampler import Policy, Turn
from manylora.types import SamplingParams

POLICY = Policy("digits", "r1", 3)


class FakeSampler:
    """Answers what a function says, as the tokenizer has it, and remembers what it was asked."""

    def __init__(self, tokenizer: Any, answer: Callable[[str], str | Sequence[int]]):
        self._tokenizer, self._answer = tokenizer, answer
        self.asked: list[tuple[int, ...]] = []
        self.seeds: list[int] = []
        self.params: list[SamplingParams] = []
        self.policies: list[Policy] = []
        self.loops: list[Any] = []

    async def generate(
        self, policy: Policy, ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Turn:
        self.asked.append(tuple(ids))
        self.seeds.append(seed)
        self.params.append(params)
        self.policies.append(policy)
        self.loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        made = self._answer(self._tokenizer.decode(list(ids)))
        tokens: Any = made
        if isinstance(made, str):
            tokens = self._tokenizer(made, add_special_tokens=False)["input_ids"]
        cut = tuple(tokens)[: params.max_tokens]
        ended = cut[-1:] and cut[-1] in (params.stop or ())
        logprobs = tuple(-0.25 - 0.001 * n for n in range(len(cut)))
        return Turn(cut, logprobs, policy.version, "stop" if ended else "length")


def entry(**rl: Any) -> AdapterEntry:
    given = {"prompts": "p.jsonl", "reward": "exact", **rl}
    return AdapterEntry.model_validate(
        {"name": "digits", "lora": {"rank": 4}, "optimizer": {"lr": 1e-3}, "rl": given}
    )


def vocabulary(size: int = 320, ends: tuple[int, ...] = (0,)) -> Vocabulary:
    return Vocabulary(size, ends, "generation_config.json")


def row(prompt: str = "one", **columns: Any) -> PromptRow:
    return PromptRow(0, "words.jsonl:1", text=prompt, columns=columns)


def uses(*given: str | Mapping[str, Any]) -> list[RewardUse]:
    return [
        RewardUse.model_validate({"use": one} if isinstance(one, str) else one) for one in given
    ]


def play_settings(tokenizer: Any, sampler: Any, **others: Any) -> PlaySettings:
    encoder = Encoder(tokenizer, ends=(0,), vocab_size=len(tokenizer))
    params = SamplingParams(max_tokens=64, temperature=1.0, stop=(0, 3))
    given: dict[str, Any] = {"params": params, **others}
    return PlaySettings(sampler=sampler, encoder=encoder, tokenizer=tokenizer, seed=7, **given)


def client(settings: PlaySettings, prompt: PromptRow, **others: Any) -> PlayClient:
    given: dict[str, Any] = {"step": 1, "group": 0, "sample": 0, **others}
    return PlayClient(settings, POLICY, prompt, **given)


def on_threads(
    play: Callable[[UserThreads], Any], log_file: Path | None = None, **others: Any
) -> Any:
    """Run a coroutine with threads of users' functions, and close them."""

    async def whole() -> Any:
        threads = UserThreads("digits", log_file, **others)
        try:
            return await play(threads)
        finally:
            await threads.close()

    return asyncio.run(whole())


def played(
    hook: Any,
    tokenizer: Any,
    answer: Any,
    prompt: PromptRow | None = None,
    *,
    settings: PlaySettings | None = None,
    **others: Any,
) -> Any:
    """Return the rollout and the sampler that it asked."""
    sampler = FakeSampler(tokenizer, answer)
    given = settings or play_settings(tokenizer, sampler)

    async def play(threads):
        deadline = time.monotonic() + 60
        it = client(given, prompt or row("one"), **{"deadline": deadline, **others})
        return await play_rollout(hook, it, prompt or row("one"), threads=threads, shown="h.py:f")

    return on_threads(play), sampler


def answers(*texts: Any) -> Any:
    """Answer one after the other, whatever is asked."""
    left = list(texts)
    return lambda _: left.pop(0)


def ids(tokenizer: Any, text: str) -> list[int]:
    made: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return made


def drawn(segment: Any) -> list[int]:
    return segment.tokens[segment.sampled].tolist()
