"""The hooks of examples/rl are played: with answers that are known, and with a real policy."""

import asyncio
import functools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.config import load_run_file
from manylora.config.rl import RlSettings
from manylora.runs.data_rows import Message
from manylora.runs.kinds import kind_of
from manylora.runs.rl.hooks import load_hook, play_rollout
from manylora.runs.rl.prompt_rows import PromptRow, read_prompts
from manylora.runs.rl.prompts import answer_params, open_prompts
from manylora.runs.rl.seeds import sample_seed
from manylora.servers.sampler import Policy, Turn
from manylora.types import SamplingParams
from tests.unit.runs.rl.fakes import POLICY, FakeSampler, client, entry, on_threads, play_settings

EXAMPLES = Path(__file__).resolve().parents[4] / "examples" / "rl"


def example(name: str) -> Any:
    return load_hook(f"{EXAMPLES / name}.py:play", "digits")


def play(name, tokenizer, answer, prompt):
    sampler = FakeSampler(tokenizer, answer)
    settings = play_settings(tokenizer, sampler)

    async def whole(threads):
        it = client(settings, prompt, deadline=time.monotonic() + 60)
        return await play_rollout(example(name), it, prompt, threads=threads)

    return on_threads(whole), sampler


SUM = PromptRow(0, "s:1", messages=(Message("user", "12*7+1?"),), columns={"answer": "85"})


def test_the_calculator_is_asked_until_the_answer_is_there(tokenizer):
    said = iter(["<calc>12*7</calc><|im_end|>", "<calc>84+1</calc><|im_end|>", "85<|im_end|>"])
    rollout, _ = play("calculator", tokenizer, lambda _: next(said), SUM)
    assert (rollout.reward, rollout.turns, len(rollout.segments)) == (1.0, 3, 1)
    (segment,) = rollout.segments
    told = tokenizer.decode(segment.tokens[~segment.sampled].tolist())
    assert "tool\n84" in told and "tool\n85" in told and "calc" not in told


@pytest.mark.parametrize("asked", ["__import__('os')", "2**99", "1/0", "(", "10**10", "'a'*9"])
def test_the_calculator_says_error_to_what_is_no_sum(tokenizer, asked):
    rollout, sampler = play("calculator", tokenizer, lambda _: f"<calc>{asked}</calc>", SUM)
    assert (rollout.reward, rollout.turns) == (0.0, 4)
    assert "tool\nerror" in tokenizer.decode(list(sampler.asked[1]))


GAME = PromptRow(0, "g:1", text="Guess:\n")


def test_a_game_is_won_by_halving(tokenizer):
    low, high = 1, 100

    def answer(asked):
        nonlocal low, high
        last = asked.splitlines()
        if last[-1] in ("higher", "lower"):
            guess = int(last[-2].removesuffix("<|end|>"))
            low, high = (guess + 1, high) if last[-1] == "higher" else (low, guess - 1)
        return f"{(low + high) // 2}\n"

    rollout, _ = play("guessing", tokenizer, answer, GAME)
    assert rollout.parts["won"] == rollout.reward > 0.5
    assert rollout.metrics["guesses"] == rollout.turns <= 7
    assert len(rollout.segments) == 1


def test_a_game_that_is_lost_is_worth_what_it_came_near(tokenizer):
    secret = random.Random(sample_seed(7, 1, 0, 0)).randint(1, 100)
    texts = iter(["no", *[str(secret + 1 if secret < 100 else 1)] * 6])
    rollout, _ = play("guessing", tokenizer, lambda _: next(texts), GAME)
    assert rollout.parts["won"] == 0.0 and rollout.turns == 7
    assert 0 < rollout.reward < 0.2
    assert "not a number" in rollout.text


class SnapshotSampler:
    """Samples from a snapshot of a Trainer, as a run's own sampler does, without anything else."""

    def __init__(self, snapshot: Any, policy: Policy):
        self._snapshot, self._policy = snapshot, policy

    async def generate(
        self, policy: Policy, ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Turn:
        assert policy == self._policy
        future = self._snapshot.sample([list(ids)], replace(params, seed=seed))
        (made,) = (await asyncio.wrap_future(future)).sequences
        return Turn(made.tokens, made.logprobs, policy.version, made.stop_reason)


@pytest.mark.parametrize("name", ["calculator", "guessing"])
def test_a_real_policy_plays_and_is_trained_by_its_own_ids(name, tmp_path):
    """What the sampler says of each token is what the trainer says of it at the same place."""
    import manylora

    row = {"prompt": "Guess:\n"}
    if name == "calculator":
        row = {"messages": [{"role": "user", "content": "12*7?"}], "answer": "84"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    settings = entry(
        prompts=f"{tmp_path}/p.jsonl", sampling={"max_tokens": 12}, reward=None, rollout="h.py:play"
    )
    with manylora.Trainer("seedling") as trainer:
        adapter = trainer.create("digits", rank=4, seed=1)
        data = [manylora.causal_datum([5, 6, 7, 8, 9], [1.0] * 5)]
        adapter.forward_backward(data)
        adapter.optim_step(lr=1e-2).result()
        sampler = SnapshotSampler(adapter.snapshot(), POLICY)
        prompts = open_prompts(
            f"{tmp_path}/p.jsonl", trainer.tokenizer, trainer.vocabulary, settings, 1024, 12
        )
        params = answer_params(RlSettings.of(settings), prompts)
        given = play_settings(trainer.tokenizer, sampler, params=params, context_length=1024)

        async def whole(threads):
            it = client(given, prompts.rows[0], deadline=time.monotonic() + 300)
            return await play_rollout(example(name), it, prompts.rows[0], threads=threads)

        rollout, again = on_threads(whole), on_threads(whole)
        assert [s.to_json() for s in rollout.segments] == [s.to_json() for s in again.segments]
        assert rollout.num_sampled > 0
        for segment in rollout.segments:
            tokens = segment.tokens.tolist()
            datum = manylora.causal_datum(tokens, [1.0] * len(tokens))
            forward = adapter.forward([datum]).result()
            said = np.concatenate([[0.0], forward.logprobs[0]])
            drawn = segment.sampled
            assert np.abs(said[drawn] - segment.logprobs[drawn]).max() < 1e-4
            assert np.abs(segment.logprobs[drawn]).max() > 0


def test_every_example_is_a_hook():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"calculator", "guessing"}
    assert all(map(callable, map(functools.partial(example), names)))


def test_the_example_of_a_run_is_ready_to_start():
    """Its rewards fit its prompts, which is all that can be wrong before the base is open."""
    run = load_run_file(EXAMPLES.parent / "rl_run" / "run.yaml")
    assert [one.name for one in run.adapters] == ["digits", "twenty"]
    for one in run.adapters:
        kind_of(one).check(one)
        assert len(read_prompts(RlSettings.of(one).prompts)) >= RlSettings.of(one).groups
