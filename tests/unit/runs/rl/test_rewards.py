"""Rewards are called by the names of their parameters, and what they return is checked."""

import asyncio
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.runs.data_rows import Message
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.reward_call import Scored
from manylora.runs.rl.rewards import RewardSet
from manylora.types import ConfigError, RewardError
from tests.unit.runs.rl.fakes import on_threads, row, uses

SAMPLES = [Scored("ab1", (5, 6, 0)), Scored("22", (7,), True)]
COLUMNS = ("answer", "level")


@pytest.fixture
def code(tmp_path):
    """Write a file of rewards, and return how its functions are named."""

    def write(text: str, symbol: str = "f") -> str:
        file = tmp_path / "rewards.py"
        file.write_text(f"import asyncio, manylora, math, numpy as np\n{text}\n")
        return f"{file}:{symbol}"

    return write


def score(given: Any, prompt: PromptRow | None = None, samples=SAMPLES, columns=COLUMNS, **more):
    prompt = row("one", answer="x", level=2) if prompt is None else prompt

    async def play(threads):
        rewards = RewardSet(uses(*given), adapter="digits", threads=threads)
        rewards.check(columns)
        return await rewards.score(prompt, samples, timeout=60, **more)

    return on_threads(play)


def test_lists_by_name_in_one_number_per_sample_out(code):
    name = code(
        "def f(completions, prompts, completion_ids, answer, level, truncated, absent=9):\n"
        "    assert prompts == ['one', 'one'] and completion_ids == [[5, 6, 0], [7]]\n"
        "    assert answer == ['x', 'x'] and level == [2, 2] and truncated == [False, True]\n"
        "    assert absent == 9\n"
        "    return [len(text) for text in completions]"
    )
    assert score([name]) == [{"f": 3.0}, {"f": 2.0}]


def test_one_at_a_time_by_name(code):
    name = code(
        "def f(completion, prompt, completion_ids, truncated, answer, level):\n"
        "    assert prompt == 'one' and answer == 'x' and level == 2\n"
        "    return len(completion) + 10 * len(completion_ids) + 100 * truncated"
    )
    assert score([name]) == [{"f": 33.0}, {"f": 112.0}]


def test_trl_functions_take_everything_by_keywords(code):
    name = code(
        "def f(completions, **others):\n"
        "    assert sorted(others) == "
        "['answer', 'completion_ids', 'level', 'missing', 'prompts', 'truncated']\n"
        "    assert others['missing'] == [None, None]\n"
        "    return [None, 1]"
    )
    assert score([name], columns=(*COLUMNS, "missing")) == [{"f": None}, {"f": 1.0}]


def test_chat_prompts_give_messages(code):
    name = code(
        "def f(completions, prompts):\n"
        "    assert prompts[1] == [{'role': 'user', 'content': 'hi'}]\n"
        "    return [len(c[0]['content']) * (c[0]['role'] == 'assistant') for c in completions]\n"
        "def g(completion):\n"
        "    return len(completion[0]['content'])"
    )
    prompt = PromptRow(0, "w.jsonl:1", messages=(Message("user", "hi"),))
    two = [name, name.replace(":f", ":g")]
    assert score(two, prompt) == [{"f": 3.0, "g": 3.0}, {"f": 2.0, "g": 2.0}]


@pytest.mark.parametrize(
    "text",
    [
        "async def f(completion):\n    await asyncio.sleep(0)\n    return len(completion)",
        "def f(completion):\n    async def later():\n        return len(completion)\n"
        "    return later()",
        "async def f(completions, **_):\n    return [len(c) for c in completions]",
        "class F:\n    async def __call__(self, completion): return len(completion)\nf = F()",
        "import functools\ndef g(least, completion):\n    return max(least, len(completion))\n"
        "f = functools.partial(g, 1)",
        "def f(completions):\n    return np.array([len(c) for c in completions])",
        "def f(completions):\n    return (np.float32(3), np.int64(2))",
    ],
)
def test_what_else_is_a_function(code, text):
    assert score([code(text)]) == [{"f": 3.0}, {"f": 2.0}]


def test_true_is_one(code):
    assert score([code("def f(completion):\n    return completion == '22'")]) == [
        {"f": 0.0},
        {"f": 1.0},
    ]


def test_args_are_keywords_and_weights_make_the_sum(code):
    name = code(
        "def f(completion, level, scale=1, *, plus):\n    return level * scale + plus\n"
        "def g(completions):\n    return [None, 4]"
    )
    given = [
        {"use": name, "weight": 0.5, "args": {"plus": 1, "level": 7}},
        {"use": name, "weight": 2.0, "args": {"plus": 0, "scale": 3}},
        {"use": name.replace(":f", ":g"), "weight": -1.0},
    ]
    parts = score(given)
    assert parts[0] == {"f": 8.0, "f_2": 6.0, "g": None}
    rewards = RewardSet(uses(*given), adapter="digits")
    assert rewards.names == ("f", "f_2", "g")
    assert [rewards.weighted(one) for one in parts] == [16.0, 12.0]
    assert rewards.weighted({"f": None, "f_2": None, "g": None}) == 0.0
    with pytest.raises(RewardError, match="is not finite"):
        rewards.weighted({"f": 1e308, "f_2": 1e308, "g": -1.7e308})


def test_a_function_may_change_what_it_is_given(code):
    name = code(
        "def f(completions, tags):\n    tags[0].append(3)\n    completions.clear()\n"
        "    return [len(tags[0]), len(tags[1])]\n"
        "def g(completion, tags):\n    tags.append(3)\n    return len(tags)"
    )
    prompt = row("one", tags=[1, 2])
    two = [name, name.replace(":f", ":g")]
    expected = [{"f": 3.0, "g": 3.0}, {"f": 2.0, "g": 3.0}]
    assert score(two, prompt, columns=("tags",)) == expected
    assert prompt.columns["tags"] == [1, 2]


def test_messages_and_ids_that_one_changes_are_no_one_elses(code):
    name = code(
        "def f(prompts, completions, completion_ids):\n"
        "    prompts[0][0]['content'] = ''\n    completions[0][0]['content'] = ''\n"
        "    completion_ids[0].clear()\n"
        "    return [len(prompts[1][0]['content']), len(completion_ids[1])]\n"
        "def g(prompt, completion, completion_ids):\n"
        "    return len(prompt[0]['content'] + completion[0]['content']) + len(completion_ids)"
    )
    prompt = PromptRow(0, "w.jsonl:1", messages=(Message("user", "hi"),))
    two = [name, name.replace(":f", ":g")]
    assert score(two, prompt) == [{"f": 2.0, "g": 8.0}, {"f": 1.0, "g": 5.0}]
    assert SAMPLES[0].token_ids == (5, 6, 0)


# -- groups -----------------------------------------------------------------------------------

GROUP = (
    "@manylora.group_reward\ndef f(completions):\n    return [len(completions)] * len(completions)"
)


def test_a_group_reward_sees_the_group_and_others_need_not(code):
    async def play(threads, given):
        rewards = RewardSet(uses(given), adapter="digits", threads=threads)
        return rewards.needs_groups, await rewards.score_each(row(), SAMPLES, timeout=60)

    plain = GROUP.removeprefix("@manylora.group_reward\n")
    found = on_threads(functools.partial(play, given=code(GROUP)))
    assert found == (True, [{"f": 2.0}, {"f": 2.0}])
    found = on_threads(functools.partial(play, given=code(plain)))
    assert found == (False, [{"f": 1.0}, {"f": 1.0}])


def test_a_fault_costs_one_sample_or_the_group(code):
    text = "def f(completions):\n    return [1 / ('22' not in c) for c in completions]"

    async def play(threads, given):
        rewards = RewardSet(uses(given), adapter="digits", threads=threads)
        return await rewards.score_each(row(), SAMPLES, timeout=60)

    first, second = on_threads(functools.partial(play, given=code(text)))
    assert first == {"f": 1.0} and isinstance(second, RewardError)
    both = on_threads(functools.partial(play, given=code(f"@manylora.group_reward\n{text}")))
    assert [type(one) for one in both] == [RewardError] * 2
    assert "ZeroDivisionError" in str(both[0])


# -- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(completions):\n    return [1, math.nan]", ", sample 1, returned nan; it must be a"),
        ("def f(completions):\n    return [math.inf, 1]", ", sample 0, returned inf"),
        ("def f(completion):\n    return -math.inf", "returned -inf"),
        ("def f(completion):\n    return 10**400", "returned 1000"),
        ("def f(completions):\n    return [1]", "returned 1 numbers for 2 samples: [1]"),
        ("def f(completions):\n    return [1, 2, 3]", "returned 3 numbers for 2 samples"),
        ("def f(completions):\n    return 1.0", "returned 1.0; it must be a list with one number"),
        ("def f(completions):\n    return '12'", "returned '12'; it must be a list"),
        ("def f(completions):\n    pass", "returned None; it must be a list"),
        (
            "def f(completions):\n    return [1, '2']",
            "sample 1, returned '2', a str; it must be a n",
        ),
        ("def f(completion):\n    return [1]", "returned [1], a list"),
        ("def f(completion):\n    return 1j", "returned 1j, a complex"),
        ("def f(completion):\n    return np.float32('nan')", "returned np.float32(nan)"),
        ("def f(completion):\n    raise KeyError('colour')", "raised KeyError"),
        ("async def f(completion):\n    raise SystemExit", "raised SystemExit"),
    ],
)
def test_what_is_no_number_is_named_with_function_row_and_value(code, text, told):
    with pytest.raises(RewardError) as caught:
        score([code(text)])
    message = str(caught.value)
    assert message.startswith("adapter digits: reward rewards.py:f on words.jsonl:1")
    assert told in message


def test_one_that_hangs_is_told_so(code):
    name = code("import threading\ndone = threading.Event()\ndef f(completion):\n    done.wait(60)")

    async def play(threads):
        rewards = RewardSet(uses(name, "exact"), adapter="digits", threads=threads)
        await rewards.score(row("one", answer="x"), SAMPLES, timeout=0.1)

    with pytest.raises(RewardError, match=r"rewards.py:f on words.jsonl:1 took longer than the 0"):
        on_threads(play)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(completion, anwser): ...", "and the prompts have no such column (did you mean"),
        ("def f(completions, zz): ...", "(there are answer, level); besides columns it can"),
        ("def f(prompts): ...", "takes neither completions (a list) nor completion (one text)"),
        ("def f(completion, completions): ...", "takes completion and completions; keep"),
        ("def f(completion, prompts): ...", "has the parameter 'prompts'; a function that takes"),
        ("def f(completions, /): ...", "takes 'completions' by position only"),
        ("def f(client, row): ...", "plays a rollout; name it with rl.rollout"),
        ("def f(completions):\n    yield 1", "is a generator (it has a yield)"),
        ("async def g(completions): ...\nf = g([])", "is a coroutine, not a function; drop its ()"),
        ("class f:\n    def __call__(self, completions): ...", "is a class; name a function"),
        ("f = 3", "is a int; name a function"),
        ("@manylora.group_reward\ndef f(completion): ...", "is marked as a group's reward, and"),
        ("f = dict.get", "takes 'self' by position only"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_reward_is_refused_before_anything_runs(code, text, told):
    with pytest.raises(ConfigError) as caught:
        RewardSet(uses(code(text)), adapter="digits").check(COLUMNS)
    assert str(caught.value).startswith("adapters.digits.rl.reward.0: rewards.py:f ")
    assert told in str(caught.value)


def test_a_column_that_there_is_not_is_named_when_there_is_none(code):
    with pytest.raises(ConfigError, match="no such column; besides columns it can ask for prompt,"):
        RewardSet(uses(code("def f(completion, answer): ...")), adapter="digits").check(())


@pytest.mark.parametrize("args", [{"scal": 1}, {"completion": "x"}])
def test_args_that_it_does_not_take_are_refused(code, args):
    given = {"use": code("def f(completion, scale=1): ..."), "args": args}
    with pytest.raises(
        ConfigError, match=f"args has '{next(iter(args))}', which rewards.py:f does"
    ):
        RewardSet(uses(given), adapter="digits")


def test_a_name_that_is_not_built_in_is_refused():
    with pytest.raises(
        ConfigError, match=r"no reward 'exakt' is built in \(did you mean exact\?\); one"
    ):
        RewardSet(uses("exakt"), adapter="digits")


def test_the_columns_that_rows_must_have(code):
    name = code("def f(completion, level, other=1, **_): ...")
    rewards = RewardSet(uses("exact", name), adapter="digits")
    assert rewards.required == ("answer", "level")


def test_no_column_takes_the_place_of_what_was_sampled(code):
    """A file of SFT's has a column `completion`."""
    name = code("def f(completion, **others):\n    return len(completion) + 100 * len(others)")
    prompt = row("one", completion="expected", answer="x")
    found = score([name], prompt, columns=("completion", "answer"))
    assert found == [{"f": 403.0}, {"f": 402.0}]

    async def unchecked(threads):
        rewards = RewardSet(uses(name), adapter="digits", threads=threads)
        return await rewards.score(prompt, SAMPLES, timeout=60)

    assert on_threads(unchecked) == found


def test_samples_and_rewards_are_scored_at_the_same_time(tmp_path: Path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "import threading\nall_there = threading.Barrier(4, timeout=60)\n"
        "def f(completion):\n    all_there.wait()\n    return 1\n"
        "def g(completion):\n    return f(0)\n"
    )
    assert score([f"{file}:f", f"{file}:g"]) == [{"f": 1.0, "g": 1.0}] * 2


def test_what_is_finite_stays_to_the_bit(code):
    name = code("def f(completion):\n    return 0.1 + 0.2")
    assert score([name])[0]["f"] == 0.1 + 0.2
    assert math.isclose(
        np.float32(0.1), score([code("def f(completion):\n    return np.float32(.1)")])[0]["f"]
    )


def test_a_cancelled_score_leaves_nothing_behind(code):
    name = code("async def f(completion):\n    await asyncio.sleep(1000)")
    told: list[str] = []

    async def play(threads):
        rewards = RewardSet(uses(name), adapter="digits", threads=threads)
        task = asyncio.ensure_future(rewards.score(row(), SAMPLES))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)

    on_threads(play, warn=told.append)
    assert told == []
