"""What a hook returns is checked, and what goes wrong in one stays with its rollout."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora import RolloutResult
from manylora.runs.rl.hooks import load_hook, play_rollout
from manylora.runs.rl.rollout import Rollout
from manylora.servers.sampler import Turn
from manylora.types import AdapterNotFound, ConfigError, DatumTooLong, RolloutFailed, SamplingParams
from tests.unit.runs.rl.fakes import (
    FakeSampler,
    answers,
    client,
    on_threads,
    play_settings,
    played,
    row,
)


def returning(value):
    async def hook(client, row):
        await client.sample([5])
        return value

    return hook


def test_a_result_has_parts_and_metrics(tokenizer):
    half: Any = np.float32(0.5)
    result = RolloutResult(reward=half, parts={"a": True, "b": None}, metrics={"guesses": 3})
    rollout, _ = played(returning(result), tokenizer, answers("x"))
    assert (rollout.reward, rollout.parts) == (0.5, {"a": 1.0, "b": None})
    assert rollout.metrics == {"guesses": 3.0} and type(rollout.reward) is float


def test_a_rollout_of_its_own_or_with_what_was_played(tokenizer):
    async def builds(client, row):
        await client.sample([5])
        return client.rollout(2.0)

    rollout, _ = played(builds, tokenizer, answers("x"))
    assert rollout.reward == 2.0 and rollout.num_sampled == 1
    rollout, _ = played(returning(Rollout(segments=(), reward=3.0)), tokenizer, answers("x"))
    assert rollout.reward == 3.0 and rollout.num_sampled == 1


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "returned the reward nan, a float; it must be a finite number"),
        (float("inf"), "returned the reward inf"),
        (None, "returned the reward None, a NoneType"),
        ("1", "returned the reward '1', a str"),
        (RolloutResult(reward=float("nan")), "returned the reward nan"),
        (
            RolloutResult(reward=1, parts={"a": "x"}),  # type: ignore[dict-item]
            "returned the part 'a' 'x', a str",
        ),
        (RolloutResult(reward=1, metrics={"m": float("inf")}), "returned the metric 'm' inf"),
        (RolloutResult(reward=1, parts=[1]), "returned parts that are a list, not a dict"),  # type: ignore[arg-type]
        (Rollout(segments=(), reward=float("nan")), "returned the reward nan"),
    ],
)
def test_what_is_no_reward_is_refused(tokenizer, value, told):
    with pytest.raises(RolloutFailed) as caught:
        played(returning(value), tokenizer, answers("x"))
    assert str(caught.value).startswith("adapter digits: rollout h.py:f on words.jsonl:1 ")
    assert told in str(caught.value)


def failure(hook, tokenizer, answer=lambda _: "x", prompt=None, **others) -> str:
    with pytest.raises(RolloutFailed) as caught:
        played(hook, tokenizer, answer, prompt, **others)
    return str(caught.value)


def test_hooks_that_go_wrong(tokenizer):
    async def nothing(client, row):
        return 1.0

    async def raises(client, row):
        raise ValueError("no such game")

    async def exits(client, row):
        raise SystemExit(2)

    async def early(client, row):
        client.extend("x")

    async def turn_of_a_text(client, row):
        await client.sample("one")
        client.extend(role="user", content="x")

    async def no_prompt(client, row):
        await client.sample({"role": "user"})

    assert "no token was sampled, so there is nothing to train on" in failure(nothing, tokenizer)
    assert "ValueError: no such game" in failure(raises, tokenizer)
    assert "SystemExit: 2" in failure(exits, tokenizer)
    assert "there is no answer yet that could be extended" in failure(early, tokenizer)
    assert "began with a text, which has no turns" in failure(turn_of_a_text, tokenizer)
    assert "a prompt is a text, messages or token ids" in failure(no_prompt, tokenizer)


def test_one_that_never_ends(tokenizer):
    async def forever(client, row):
        while True:
            await client.sample([5])

    message = failure(forever, tokenizer, deadline=time.monotonic() + 0.2)
    assert "rollout h.py:f on words.jsonl:1 took longer than the 0" in message


def test_a_full_context_can_be_noticed(tokenizer):
    async def hook(client, row):
        await client.sample([5, 6])
        with pytest.raises(
            DatumTooLong, match="the prompt has 4 tokens; the base's context holds 4"
        ):
            await client.sample(client.extend([7]))
        return 1

    sampler = FakeSampler(tokenizer, answers("x"))
    settings = play_settings(tokenizer, sampler, context_length=4)
    rollout, _ = played(hook, tokenizer, None, settings=settings)
    assert rollout.turns == 1


def test_a_client_answers_no_more_once_its_rollout_is_over(tokenizer):
    kept: list[Any] = []

    async def hook(client, row):
        async def later():
            await asyncio.sleep(0.02)
            try:
                await client.sample([5])
            except RolloutFailed as error:
                kept.append(str(error))
            done.set()

        await client.sample([5])
        kept.append(asyncio.create_task(later()))
        return 1

    done = threading.Event()
    sampler = FakeSampler(tokenizer, lambda _: "x")

    async def play(threads):
        await play_rollout(
            hook, client(play_settings(tokenizer, sampler), row()), row(), threads=threads
        )
        assert await asyncio.to_thread(done.wait, 60)

    on_threads(play, warn=lambda _: None)
    assert kept[1] == "the rollout is over; its client answers no more"
    assert len(sampler.asked) == 1


def test_what_the_sampler_raises_is_not_the_hooks_fault(tokenizer):
    async def hook(client, row):
        await client.sample([5])

    def gone(_):
        raise AdapterNotFound("no policy digits of version 3 is published")

    with pytest.raises(AdapterNotFound, match="version 3 is published"):
        played(hook, tokenizer, gone)


def test_a_rollout_whose_time_is_over_is_cancelled_at_the_sampler(tokenizer):
    cancelled = threading.Event()

    class Slow(FakeSampler):
        async def generate(self, policy, ids, params, seed) -> Turn:
            try:
                await asyncio.sleep(1000)
                raise AssertionError
            except asyncio.CancelledError:
                cancelled.set()
                raise

    async def hook(client, row):
        await client.sample([5])

    async def play(threads):
        settings = play_settings(tokenizer, Slow(tokenizer, lambda _: "x"))
        it = client(settings, row(), deadline=time.monotonic() + 0.1)
        with pytest.raises(RolloutFailed, match="took longer"):
            await play_rollout(hook, it, row(), threads=threads)
        assert await asyncio.to_thread(cancelled.wait, 60)

    on_threads(play)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(client, row): ...", "must be written as `async def play(client, row)`"),
        ("async def f(client): ...", "must be written as"),
        ("class f: ...", "must be written as"),
        ("async def g(client, row): ...\nf = g(1, 2)", "is a coroutine, not a function"),
        ("async def f(client, row):\n    yield 1", "must be written as"),
    ],
)
def test_what_is_no_hook_is_refused_before_anything_runs(tmp_path: Path, text, told):
    (tmp_path / "hooks.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_hook(f"{tmp_path}/hooks.py:f", "digits")
    assert str(caught.value).startswith("adapters.digits.rl.rollout: hooks.py:f ")
    assert told in str(caught.value)


def test_params_without_stop_tokens_end_as_the_base_does(tokenizer):
    async def hook(client, row):
        assert (await client.sample([5])).text == "four"
        return 1

    class Ends(FakeSampler):
        async def generate(self, policy, ids, params, seed):
            turn = await super().generate(policy, ids, params, seed)
            return Turn(turn.tokens, turn.logprobs, turn.version, "stop")

    sampler = Ends(tokenizer, answers("four<|end|>"))
    played(
        hook, tokenizer, None, settings=play_settings(tokenizer, sampler, params=SamplingParams())
    )
