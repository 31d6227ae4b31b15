"""Rewards that are built in: what they give, and what is said of wrong settings."""

import sys

import pytest

from manylora.runs.rl.reward_call import Scored
from manylora.runs.rl.rewards import RewardSet
from manylora.types import ConfigError, RewardError
from tests.unit.runs.rl.fakes import on_threads, row, uses

SCHEMA = {"schema": {"type": "object", "required": ["a"]}}


def score(name, args, text, ids=(1, 2, 3), **columns):
    async def play(threads):
        rewards = RewardSet(uses({"use": name, "args": args}), adapter="digits", threads=threads)
        rewards.check(tuple(columns))
        return await rewards.score(row("p", **columns), [Scored(text, ids)], timeout=60)

    ((_, value),) = on_threads(play)[0].items()
    return value


@pytest.mark.parametrize(
    ("name", "args", "text", "columns", "expected"),
    [
        ("exact", {}, " four\n", {"answer": "four"}, 1.0),
        ("exact", {"strip": False}, " four", {"answer": "four"}, 0.0),
        ("exact", {"column": "right", "ignore_case": True}, "FOUR", {"right": "four"}, 1.0),
        ("exact", {}, "4", {"answer": 4}, 1.0),
        ("exact", {}, "Four", {"answer": "four"}, 0.0),
        ("contains", {"text": "the"}, "on the hill", {}, 1.0),
        ("contains", {"text": ["the", "sea"]}, "on the hill", {}, 0.0),
        ("contains", {"column": "word"}, "on the hill", {"word": "hill"}, 1.0),
        ("contains", {"column": "word"}, "on the hill", {"word": ["hill", "on"]}, 1.0),
        ("contains", {"text": "THE", "ignore_case": True}, "on the hill", {}, 1.0),
        ("regex", {"pattern": r"\d{2}"}, "ab 12", {}, 1.0),
        ("regex", {"pattern": r"\d{2}", "full": True}, "ab 12", {}, 0.0),
        ("regex", {"pattern": "<a>(.*?)</a>", "column": "x"}, "<a> 7 </a>", {"x": 7}, 1.0),
        ("regex", {"pattern": "<a>(.*?)</a>", "column": "x"}, "<a>8</a>", {"x": 7}, 0.0),
        ("length", {"target": 20}, "x" * 20, {}, 0.0),
        ("length", {"target": 20}, "x" * 10, {}, -0.5),
        ("length", {"target": 4, "unit": "tokens", "scale": 2.0}, "x", {}, -0.5),
        ("length", {"target": 4, "unit": "words"}, "a b", {}, -0.5),
        ("length", {"target": 0}, "ab", {}, -2.0),
        ("json_schema", SCHEMA, '{"a": 1}', {}, 1.0),
        ("json_schema", SCHEMA, '{"b": 1}', {}, 0.0),
        ("json_schema", SCHEMA, "no json", {}, 0.0),
        ("json_schema", SCHEMA, "[" * 100_000, {}, 0.0),
        ("math_verify", {}, "so it is $\\frac{1}{2}$", {"answer": "$0.5$"}, 1.0),
        ("math_verify", {}, "so it is $3$", {"answer": "$4$"}, 0.0),
        ("math_verify", {}, "no idea", {"answer": "$4$"}, 0.0),
        ("math_verify", {}, "$4$", {"answer": ""}, None),
    ],
)
def test_what_they_give(name, args, text, columns, expected):
    assert score(name, args, text, **columns) == expected


def refusal(name, args, columns=()):
    with pytest.raises(ConfigError) as caught:
        RewardSet(uses({"use": name, "args": args}), adapter="digits").check(columns)
    assert str(caught.value).startswith("adapters.digits.rl.reward.0: ")
    return str(caught.value)


def test_settings_that_are_wrong_are_named():
    assert "args.colum: is not a setting of exact; did you mean column?" in refusal(
        "exact", {"colum": "x"}
    )
    assert "args.target: is missing; length needs it" in refusal("length", {})
    assert "args.pattern: is no regular expression" in refusal("regex", {"pattern": "("})
    assert "has no group" in refusal("regex", {"pattern": "a", "column": "x"})
    assert "give either text or column" in refusal("contains", {})
    assert "args.schema: is missing" in refusal("json_schema", {})
    assert "schema is no JSON schema" in refusal("json_schema", {"schema": {"type": 3}})
    assert "args.target" in refusal("length", {"target": "20"})


def test_the_column_that_is_not_there_is_named():
    message = refusal("exact", {}, ("anser", "level"))
    assert "exact has the parameter 'answer', and the prompts have no such column" in message
    assert "did you mean anser?" in message


@pytest.mark.parametrize(
    ("name", "args", "module", "remedy"),
    [
        ("json_schema", SCHEMA, "jsonschema", "pip install jsonschema"),
        ("math_verify", {}, "math_verify", "pip install 'manylora[math]'"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_remedy(
    name, args, module, remedy, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(name, args)
    assert f"the reward {name} needs the package {module}; install it: {remedy}" in message


def test_a_pattern_that_takes_centuries_is_an_error_of_the_sample(monkeypatch):
    monkeypatch.setattr("manylora.runs.rl.builtin_rewards._ONE_MATCH", 0.05)
    with pytest.raises(RewardError, match="s to match; write it simpler"):
        score("regex", {"pattern": "(a|aa)+$"}, "a" * 200 + "b")


def test_a_column_of_another_kind_is_named():
    with pytest.raises(RewardError, match="column 'answer' holds a list; it must be text"):
        score("exact", {}, "x", answer=["x"])


def test_conversations_are_scored_by_their_text():
    from manylora.runs.data_rows import Message
    from manylora.runs.rl.prompt_rows import PromptRow

    prompt = PromptRow(0, "w:1", messages=(Message("user", "q"),), columns={"answer": "yes"})

    async def play(threads):
        rewards = RewardSet(uses("exact"), adapter="digits", threads=threads)
        return await rewards.score(prompt, [Scored("yes", (1,))], timeout=60)

    assert on_threads(play) == [{"exact": 1.0}]
