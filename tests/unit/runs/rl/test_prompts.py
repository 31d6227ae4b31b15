"""Prompts are read and tokenised as fine-tuning reads its own; what is wrong is named by line."""

import json
from typing import Any

import pytest

from manylora.config.rl import RlSettings
from manylora.runs.encode import Encoder
from manylora.runs.rl.prompt_rows import read_prompts
from manylora.runs.rl.prompts import answer_params, open_prompts
from manylora.runs.sources import read_source
from manylora.types import DataError, DatumTooLong
from tests.unit.runs.rl.fakes import entry, vocabulary
from tests.unit.runs.templates import CLOSING, ENDS_OTHERWISE, OPENING, SYSTEM_LAST, TOOLS

USER = [{"role": "user", "content": "one two"}]
SYSTEM = [{"role": "system", "content": "three"}, *USER]


def write(folder, *rows, name="p.jsonl"):
    file = folder / name
    file.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(file)


def opened(source, tokenizer, context=None, max_tokens=8, **others):
    given: dict[str, Any] = {"vocabulary": vocabulary(), "entry": entry(), **others}
    return open_prompts(source, tokenizer, context_length=context, max_tokens=max_tokens, **given)


def refusal(function, *arguments, **others):
    with pytest.raises(DataError) as caught:
        function(*arguments, **others)
    return str(caught.value)


def test_texts_and_conversations_with_their_columns(tmp_path, tokenizer):
    file = write(
        tmp_path,
        {"prompt": "one", "answer": 4, "tags": ["a"]},
        "",
        {"messages": USER, "level": None},
        {"prompt": SYSTEM, "completion": "expected"},
    )
    prompts = opened(file, tokenizer)
    first, second, third = prompts.rows
    assert (first.number, first.place, first.prompt) == (0, f"{file}:1", "one")
    assert first.columns == {"answer": 4, "tags": ["a"]} and not first.chat
    assert second.place == f"{file}:3" and second.prompt == USER and second.chat
    assert third.prompt == SYSTEM and third.columns == {"completion": "expected"}
    assert prompts.source.columns == ("answer", "tags", "level", "completion")
    assert len(prompts) == 3 and prompts.longest == max(len(row.tokens) for row in prompts.rows)
    assert second.for_hook() == {"prompt": USER, "messages": USER, "level": None}
    first.for_hook()["tags"].append("b")
    assert first.columns["tags"] == ["a"]


@pytest.mark.parametrize("template", [None, CLOSING, OPENING, SYSTEM_LAST, ENDS_OTHERWISE])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_ids_are_those_that_fine_tuning_trains_behind(tmp_path, template, adds_bos):
    from tests.unit.runs.small_tokenizer import CHATML, make_tokenizer

    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template or CHATML)
    answer = [{"role": "assistant", "content": "four"}]
    for shown, trained in (
        ({"prompt": "one two"}, {"prompt": "one two", "completion": "four"}),
        ({"messages": SYSTEM}, {"messages": [*SYSTEM, *answer]}),
    ):
        prompts = opened(write(tmp_path, shown), tokenizer)
        source = read_source(write(tmp_path, trained, name="sft.jsonl"))
        encoder = Encoder(tokenizer, ends=(0,))
        encoded = encoder.encode(source)
        (datum,) = encoded.data
        tokens = (*datum.tokens.tolist(), int(datum.loss_inputs["target_tokens"][-1]))
        start = int(datum.loss_inputs["weights"].nonzero()[0][0]) + 1
        assert prompts.rows[0].tokens == tokens[:start]
        assert prompts.text_format.stop == encoder.stops(encoded)


def test_what_the_template_is_told_besides(tmp_path, tokenizer_with_template):
    tokenizer = tokenizer_with_template(TOOLS)
    calls = [{"type": "function", "function": {"name": "add"}}]
    row = {"messages": USER, "tools": calls, "chat_template_kwargs": {"prefix": "yes"}}
    (made,) = opened(write(tmp_path, row), tokenizer).rows
    text = tokenizer.decode(list(made.tokens))
    assert text.startswith("<|im_start|>system\n[") and '"add"' in text
    assert text.endswith("<|im_start|>assistant\nyes")
    assert made.columns["tools"] == calls


def test_a_table_is_read_too(tmp_path, tokenizer):
    file = write(tmp_path, "prompt,answer", "one,1", "two,", name="p.csv")
    rows = opened(file, tokenizer).source
    assert [dict(row.columns) for row in rows.rows] == [{"answer": "1"}, {}]
    assert "p.csv:3: has no column 'answer', which exact asks for; it has none" in refusal(
        rows.require, ("answer",), "exact"
    )


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "is not JSON"),
        ([1], "is a list, not an object; a row is"),
        ({"answer": 1}, "has neither prompt nor messages"),
        ({"prompt": "a", "messages": USER}, "has prompt and messages"),
        ({"prompt": ""}, "'prompt' is empty; drop the row"),
        ({"prompt": []}, "'prompt' is an empty list"),
        ({"prompt": 3}, "'prompt' is the number 3; it must be a list"),
        ({"messages": "x"}, "'messages' is the string 'x'; it must be a list"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
        ({"messages": [*USER, {"role": "assistant", "content": "b"}]}, "ends with a turn of the"),
        ({"prompt": "a", "system": "b"}, "has 'system', which would be left out; put it into"),
        ({"prompt": "a", "images": ["b"]}, "only text can be trained"),
        ({"prompt": "a", "tools": [{}]}, "has 'tools', which only a chat template can use"),
        ({"messages": USER, "chat_template_kwargs": {"tokenize": 1}}, "may not set 'tokenize'"),
        ('{"prompt": "\\ud800"}', "'prompt' has half of a surrogate pair"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, row, told):
    file = write(tmp_path, {"prompt": "fine"}, row if isinstance(row, str) else json.dumps(row))
    message = refusal(read_prompts, file)
    assert message.startswith(f"{file}:2: ") and told in message
    assert "completion" not in message


def test_a_file_without_rows(tmp_path):
    assert "has no rows; a row is" in refusal(read_prompts, write(tmp_path, ""))
    assert "there is no such file" in refusal(read_prompts, str(tmp_path / "none.jsonl"))


def test_a_prompt_that_leaves_no_room_for_its_answer(tmp_path, tokenizer):
    file = write(tmp_path, {"prompt": "a"}, {"prompt": "abcdefgh" * 4})
    size = opened(file, tokenizer).longest
    assert len(opened(file, tokenizer, context=size + 8)) == 2
    with pytest.raises(DatumTooLong) as caught:
        opened(file, tokenizer, context=size + 7)
    assert str(caught.value) == (
        f"{file}:2: has {size} tokens, and an answer may have 8; the base's context holds "
        f"{size + 7}, so shorten the prompt, drop the row, or lower rl.sampling.max_tokens of "
        "adapter 'digits'"
    )


def test_the_first_row_without_a_column_is_named(tmp_path):
    file = write(
        tmp_path,
        {"prompt": "a", "answer": 0},
        {"prompt": "a", "answer": None, "x": 1},
        {"prompt": "c"},
    )
    rows = read_prompts(file)
    message = refusal(rows.require, ("answer",), "reward exact")
    assert message.startswith(f"{file}:2: has no column 'answer', which reward exact asks for")
    rows.require((), "nobody")


def test_fewer_prompts_than_groups(tmp_path):
    rows = read_prompts(write(tmp_path, {"prompt": "a"}, {"prompt": "b"}))
    rows.check_steps(2)
    message = refusal(rows.check_steps, 3)
    assert "has 2 prompts, and a step takes groups: 3, so there are 0 whole steps" in message
    assert "give at least 3 prompts, or groups: 2 for 1 step an epoch" in message


def test_what_the_base_lacks(tmp_path, tokenizer, tokenizer_with_template):
    file = write(tmp_path, {"messages": USER})
    assert "p.jsonl:1: has messages, but the base's tokenizer has no chat template" in refusal(
        opened, file, tokenizer_with_template(None)
    )
    assert "p.jsonl:1: has the token" in refusal(opened, file, tokenizer, vocabulary=vocabulary(5))
    assert "has no tokenizer" in refusal(opened, file, None)
    refuses = "{{ raise_exception('no such thing') }}"
    assert "p.jsonl:1: the chat template refuses it: no such thing" in refusal(
        opened, file, tokenizer_with_template(refuses)
    )


@pytest.mark.parametrize(("stop", "expected"), [(None, (0, 3)), ([], ()), ([9], (9,))])
def test_answers_end_where_fine_tuning_ends_them_unless_it_is_said(
    tmp_path, tokenizer, stop, expected
):
    sampling = {"max_tokens": 5, "temperature": 0.5, "stop": stop, "stop_strings": ["x"]}
    settings = entry(sampling=sampling).kind_settings
    assert isinstance(settings, RlSettings)
    params = answer_params(settings, opened(write(tmp_path, {"messages": USER}), tokenizer))
    assert (params.stop, params.max_tokens, params.temperature) == (expected, 5, 0.5)
    assert params.stop_strings == ("x",)
