"""A hook plays with one policy; what was sampled is trained by its own ids, and nothing else is."""

import asyncio
import functools
import time
from typing import Any

import numpy as np
import pytest

from manylora.runs.data_rows import Message
from manylora.runs.rl.hooks import play_rollout
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.rewards import RewardSet
from manylora.runs.rl.rollout import Rollout
from manylora.runs.rl.seeds import sample_seed
from manylora.runs.rl.single_turn import as_scored, play_answer, rewarded
from manylora.servers.sampler import Policy, Turn
from tests.unit.runs.rl.fakes import (
    POLICY,
    FakeSampler,
    answers,
    client,
    drawn,
    ids,
    on_threads,
    play_settings,
    played,
    row,
    uses,
)
from tests.unit.runs.small_tokenizer import CHATML, make_tokenizer
from tests.unit.runs.templates import CLOSING, MARKERS, NO_SYSTEM, OPENING, SYSTEM_LAST, THINKING

USER = [{"role": "user", "content": "one two"}]
CHAT = PromptRow(0, "words.jsonl:1", messages=(Message("user", "one two"),))
END, IM_END = 0, 3


# -- one turn ---------------------------------------------------------------------------------


def test_a_number_is_the_reward(tokenizer):
    seen: list[Any] = []

    async def hook(client, row):
        turn = await client.sample(row["prompt"], max_tokens=5)
        seen.append((turn, client.num_turns, client.step, client.seed, row["answer"]))
        return len(turn.text)

    rollout, sampler = played(hook, tokenizer, answers("four<|end|>"), row("one", answer=4), step=9)
    ((turn, turns, step, seed, answer),) = seen
    front, made = ids(tokenizer, "one"), ids(tokenizer, "four<|end|>")
    assert (turn.text, turn.token_ids, turn.version) == ("four", tuple(made), 3)
    assert (turn.stop_reason, turns, step, answer) == ("stop", 1, 9, 4)
    assert seed == sample_seed(7, 9, 0, 0)
    (segment,) = rollout.segments
    assert segment.tokens.tolist() == front + made
    assert drawn(segment) == made and segment.versions[segment.sampled].tolist() == [3] * len(made)
    assert np.array_equal(segment.logprobs[segment.sampled], np.float32(turn.logprobs))
    assert (rollout.reward, rollout.turns, rollout.text) == (4.0, 1, "four")
    assert sampler.policies == [POLICY] and sampler.params[0].max_tokens == 5
    assert sampler.seeds == [sample_seed(7, 9, 0, 0, 1)]


def test_the_sampler_is_asked_on_the_runs_loop_and_the_hook_has_another(tokenizer):
    loops = []

    async def hook(client, row):
        await client.sample("one")
        loops.append(asyncio.get_running_loop())
        return 1

    sampler = FakeSampler(tokenizer, answers("four"))
    settings = play_settings(tokenizer, sampler)

    async def play(threads):
        loops.append(asyncio.get_running_loop())
        await play_rollout(hook, client(settings, row()), row(), threads=threads)

    on_threads(play)
    assert sampler.loops == [loops[0]] and loops[0] is not loops[1]


def test_what_ends_an_answer(tokenizer):
    async def hook(client, row):
        await client.sample([5, 6])
        await client.sample([5, 6], stop=[7], stop_strings=["x"], max_tokens=10_000)
        return 0.0

    settings_of = functools.partial(play_settings, tokenizer, context_length=50)
    sampler = FakeSampler(tokenizer, answers("a", "b"))
    played(hook, tokenizer, None, settings=settings_of(sampler))
    first, second = sampler.params
    assert (first.stop, first.stop_strings, first.max_tokens) == ((0, 3), (), 48)
    assert (second.stop, second.stop_strings, second.max_tokens) == ((7,), ("x",), 48)


def test_rewards_take_the_same_way(tokenizer):
    sampler = FakeSampler(tokenizer, answers("four<|im_start|><|end|>"))
    settings = play_settings(tokenizer, sampler)
    prompt = PromptRow(0, "w:1", text="one", columns={"answer": "four"}, tokens=(5, 6))

    async def play(threads):
        rewards = RewardSet(
            uses("exact", {"use": "length", "args": {"target": 8}, "weight": 2.0}),
            adapter="digits",
            threads=threads,
        )
        it = client(settings, prompt)
        turn = await play_answer(it, prompt)
        (parts,) = await rewards.score(prompt, [as_scored(it, turn)])
        return rewarded(it, rewards, parts, begun=time.monotonic())

    rollout = on_threads(play)
    assert rollout.parts == {"exact": 1.0, "length": -0.5} and rollout.reward == 0.0
    assert rollout.segments[0].tokens.tolist()[:2] == [5, 6]
    assert Rollout.of_json(rollout.to_json()).parts == rollout.parts


# -- several turns ----------------------------------------------------------------------------


def test_turns_that_continue_each_other_are_one_sequence(tokenizer):
    async def hook(client, row):
        await client.sample(row["prompt"])
        await client.sample(client.extend(role="tool", content="84"))
        return 1

    said = answers("call<|im_end|>", "so 84<|im_end|>")
    rollout, sampler = played(hook, tokenizer, said, CHAT)
    (segment,) = rollout.segments
    text = (
        "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\ncall<|im_end|>\n"
        "<|im_start|>tool\n84<|im_end|>\n<|im_start|>assistant\nso 84<|im_end|>"
    )
    assert tokenizer.decode(segment.tokens.tolist()) == text
    assert tokenizer.decode(drawn(segment)) == "call<|im_end|>so 84<|im_end|>"
    assert rollout.turns == 2 and rollout.text.endswith("so 84<|im_end|>")
    assert rollout.text.startswith("call<|im_end|>\n<|im_start|>tool")
    assert sampler.asked[1] == tuple(segment.tokens[: len(sampler.asked[1])].tolist())
    assert sampler.seeds == [sample_seed(7, 1, 0, 0, turn) for turn in (1, 2)]


def test_what_was_sampled_keeps_its_own_ids(tokenizer):
    """The policy may draw a text in other pieces than the tokenizer would cut it in."""
    odd = [*ids(tokenizer, "r"), *ids(tokenizer, "e"), *ids(tokenizer, "v"), IM_END]
    assert ids(tokenizer, "rev") != odd[:-1]

    async def extends(client, row):
        await client.sample(row["prompt"])
        await client.sample(client.extend(role="user", content="again"))
        return 1

    async def lists(client, row):
        turn = await client.sample(row["prompt"])
        said = [
            *row["prompt"],
            {"role": "assistant", "content": turn.text},
            {"role": "user", "content": "again"},
        ]
        await client.sample(said)
        return 1

    async def texts(client, row):
        turn = await client.sample("one")
        await client.sample(f"one{turn.text}again")
        return 1

    for hook in (extends, lists, texts):
        rollout, _ = played(hook, tokenizer, answers(odd, "x<|im_end|>"), CHAT)
        (segment,) = rollout.segments
        assert drawn(segment) == [*odd, *ids(tokenizer, "x<|im_end|>")], hook.__name__


def test_an_answer_that_was_cut_is_ended_by_what_is_read(tokenizer):
    async def hook(client, row):
        await client.sample(row["prompt"], max_tokens=3)
        await client.sample(client.extend(role="user", content="go on"))
        return 1

    rollout, _ = played(hook, tokenizer, answers("a b c d e", "x<|im_end|>"), CHAT)
    (segment,) = rollout.segments
    cut = tokenizer.decode(ids(tokenizer, "a b c d e")[:3])
    assert tokenizer.decode(drawn(segment)) == f"{cut}x<|im_end|>"
    assert f"{cut}<|im_end|>\n<|im_start|>user" in tokenizer.decode(segment.tokens.tolist())


def test_several_turns_may_follow_an_answer(tokenizer):
    async def hook(client, row):
        await client.sample(row["prompt"])
        client.extend(role="tool", content="1")
        await client.sample(client.extend(role="tool", content="2"))
        return 1

    rollout, _ = played(hook, tokenizer, answers("a<|im_end|>", "b<|im_end|>"), CHAT)
    text = tokenizer.decode(rollout.segments[0].tokens.tolist())
    assert len(rollout.segments) == 1
    assert "a<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n" in text


def test_texts_and_ids_go_behind_an_answer_as_they_stand(tokenizer):
    async def hook(client, row):
        await client.sample("one")
        client.extend(" two")
        await client.sample(client.extend([5, 6]))
        return 1

    rollout, _ = played(hook, tokenizer, answers("a", "b"))
    (segment,) = rollout.segments
    expected = [*ids(tokenizer, "one"), *ids(tokenizer, "a"), *ids(tokenizer, " two"), 5, 6]
    assert segment.tokens.tolist() == [*expected, *ids(tokenizer, "b")]


def test_a_turn_that_does_not_continue_opens_a_sequence_of_its_own(tokenizer):
    async def hook(client, row):
        await client.sample([5, 6, 7])
        await client.sample([5, 6])
        await client.sample([5, 6, *ids(tokenizer, "bb"), 9])
        return 1

    rollout, _ = played(hook, tokenizer, answers("aa", "bb", "cc"))
    first, second = rollout.segments
    assert first.tokens.tolist() == [5, 6, 7, *ids(tokenizer, "aa")]
    assert second.tokens.tolist() == [5, 6, *ids(tokenizer, "bb"), 9, *ids(tokenizer, "cc")]
    assert drawn(second) == [*ids(tokenizer, "bb"), *ids(tokenizer, "cc")]


def test_turns_at_the_same_time_are_told_apart_by_when_they_were_asked(tokenizer):
    async def hook(client, row):
        one, other = await asyncio.gather(client.sample([5]), client.sample([6]))
        await asyncio.gather(
            client.sample([6, *other.token_ids, 9]), client.sample([5, *one.token_ids, 9])
        )
        return 1

    rollout, sampler = played(hook, tokenizer, lambda asked: f"a{len(asked)}")
    assert [segment.tokens[0] for segment in rollout.segments] == [5, 6]
    assert len(set(sampler.seeds)) == 4 and rollout.turns == 4


@pytest.mark.parametrize(
    ("template", "segments"),
    [(CHATML, 1), (CLOSING, 1), (NO_SYSTEM, 1), (MARKERS, 1), (OPENING, 2), (SYSTEM_LAST, 1)],
)
def test_templates_in_their_manners(template, segments):
    """What is trained is what a template asks with; one that rewrites begins a new sequence."""
    tokenizer, said = make_tokenizer(template=template), []

    async def hook(client, row):
        turn = await client.sample(row["prompt"])
        said.append(turn.text)
        await client.sample(client.extend(role="user", content="three"))
        return 1

    ended = "thought</think>four<|end|>" if template == OPENING else " four <|end|>"
    if template not in (OPENING, SYSTEM_LAST, MARKERS):
        ended = " four <|im_end|>"
    rollout, sampler = played(hook, tokenizer, answers(ended, "x<|end|>"), CHAT)
    assert len(rollout.segments) == segments
    shown = [*USER, {"role": "assistant", "content": said[0]}]
    whole = tokenizer.apply_chat_template(
        [*shown, {"role": "user", "content": "three"}], tokenize=False, add_generation_prompt=True
    )
    asked = tokenizer.decode(list(sampler.asked[1]))
    assert _without_blanks(asked).replace("<|end|>", "") == _without_blanks(whole).replace(
        "<|end|>", ""
    )
    if segments == 2:
        assert asked == whole


def _without_blanks(text: Any) -> str:
    return "".join(text.split())


def test_a_template_that_drops_thoughts_begins_a_sequence_without_them():
    tokenizer = make_tokenizer(template=THINKING)

    async def hook(client, row):
        await client.sample(row["prompt"])
        await client.sample(client.extend(role="user", content="three"))
        return 1

    said = answers("<think>\nhm\n</think>\n\nfour<|im_end|>", "x<|im_end|>")
    rollout, sampler = played(hook, tokenizer, said, CHAT)
    assert len(rollout.segments) == 2
    assert "hm" in tokenizer.decode(drawn(rollout.segments[0]))
    assert "hm" not in tokenizer.decode(list(sampler.asked[1]))
    assert not rollout.segments[1].sampled[: len(sampler.asked[1])].any()


# -- versions ---------------------------------------------------------------------------------


def test_an_interrupted_answer_goes_on_under_newer_weights(tokenizer):
    class Cut(FakeSampler):
        async def generate(self, policy, ids, params, seed):
            turn = await super().generate(policy, ids, params, seed)
            reason = "interrupted" if policy.version < 5 else turn.stop_reason
            return Turn(turn.tokens, turn.logprobs, turn.version, reason)

    async def hook(client, row):
        turn = await client.sample([5, 6])
        assert (turn.version, turn.stop_reason) == (5, "stop")
        return 1

    sampler = Cut(tokenizer, answers("a", "b", "c<|end|>"))
    newer = iter((4, 5))
    rollout, _ = played(
        hook,
        tokenizer,
        None,
        settings=play_settings(tokenizer, sampler),
        renew=lambda: Policy("digits", "r1", next(newer)),
    )
    (segment,) = rollout.segments
    assert tokenizer.decode(drawn(segment)) == "abc<|end|>"
    assert segment.versions.tolist() == [-1, -1, 3, 4, 5, 5]
    assert sampler.asked[2] == (5, 6, *ids(tokenizer, "a"), *ids(tokenizer, "b"))
    assert [p.max_tokens for p in sampler.params] == [64, 63, 62] and len(set(sampler.seeds)) == 3


def test_seeds_follow_from_their_numbers_alone():
    assert sample_seed(7, 1, 2, 3, 4) == 7980817750376471680
    assert all(0 <= sample_seed(-1, *numbers) < 2**63 for numbers in [(0, 0, 0), (1, 2**40, 3)])
    many = {
        sample_seed(0, s, g, n, t)
        for s in range(8)
        for g in range(8)
        for n in range(8)
        for t in range(4)
    }
    assert len(many) == 8 * 8 * 8 * 4
