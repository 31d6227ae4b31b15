"""Chat templates of every manner: each turn is trained as it would be asked for.

The oracle is the tokenizer's own `apply_chat_template`: what is read before an answer is exactly
the text that asks for that answer.
"""

import json

import pytest

from manylora.runs.encode import Encoder
from manylora.runs.sources import read_source
from manylora.types import ConfigError, DataError
from tests.unit.runs import templates
from tests.unit.runs.small_tokenizer import CHATML, make_tokenizer
from tests.unit.runs.test_encode import learned, sequence

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "the first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "the second"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "the third"},
]
SYSTEM = {"role": "system", "content": "be brief"}
OTHERS = [*TURNS[:3], {"role": "assistant", "content": "<b>2</b>"}]


@pytest.fixture
def encode(tmp_path):
    def encode(template, row, **settings):
        tokenizer = make_tokenizer(template=template)
        rows = row if isinstance(row, list) else [row]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        encoded = Encoder(tokenizer, **settings).encode(read_source(str(tmp_path / "d.jsonl")))
        return encoded, tokenizer

    return encode


def spans(datum) -> list[tuple[int, int]]:
    """The parts of a sequence that are learned."""
    weights = [0.0, *datum.loss_inputs["weights"].tolist(), 0.0]
    edges = [i for i in range(1, len(weights)) if weights[i] != weights[i - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def answers(encoded, tokenizer) -> list[tuple[str, str]]:
    """Of every learned turn: what was read before it, and what is learned."""
    found = []
    for datum in encoded.data:
        tokens = sequence(datum)
        found += [
            (tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:end]))
            for start, end in spans(datum)
        ]
    return found


ENDS = {
    "CLOSING": "<|im_end|>",
    "THINKING": "<|im_end|>",
    "SYSTEM_LAST": "<|end|>",
    "ENDS_OTHERWISE": "<|end|>",
    "NO_SYSTEM": "<|im_end|>",
    "MARKS_THE_HEADER": "<|im_end|>",
    "TOOLS": "<|im_end|>",
}
DATA = {"THINKING": 3, "ENDS_OTHERWISE": 3}


@pytest.mark.parametrize("messages", [TURNS[:2], TURNS[:4], TURNS, OTHERS])
@pytest.mark.parametrize("name", ENDS)
def test_each_turn_is_learned_as_it_is_asked_for(encode, name, messages):
    encoded, tokenizer = encode(getattr(templates, name), {"messages": messages})
    turns = [number for number, m in enumerate(messages) if m["role"] == "assistant"]
    found = answers(encoded, tokenizer)
    assert len(found) == len(turns)
    for number, (read, answer) in zip(turns, found, strict=True):
        assert read == tokenizer.apply_chat_template(
            messages[:number], tokenize=False, add_generation_prompt=True
        )
        assert answer.endswith(messages[number]["content"] + ENDS[name])
    assert len(encoded.data) == min(len(turns), DATA.get(name, 1))
    assert encoded.ends == {tokenizer.convert_tokens_to_ids(ENDS[name])}


def test_a_system_s_text_that_moves_to_the_last_question(encode):
    messages = [SYSTEM, *TURNS]
    encoded, tokenizer = encode(templates.SYSTEM_LAST, {"messages": messages})
    reads = [read for read, _ in answers(encoded, tokenizer)]
    assert reads == [
        tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True)
        for n in (2, 4, 6)
    ]
    assert [answer for _, answer in answers(encoded, tokenizer)] == [
        " the first<|end|>",
        " the second<|end|>",
        " the third<|end|>",
    ]


def test_earlier_thoughts_are_dropped_and_later_ones_learned(encode):
    thoughtful = [
        {**m, "content": f"<think>\nhm {n}\n</think>\n\n{m['content']}"}
        if m["role"] == "assistant"
        else m
        for n, m in enumerate(TURNS[:4])
    ]
    encoded, tokenizer = encode(templates.THINKING, {"messages": thoughtful})
    first, second = answers(encoded, tokenizer)
    assert first[1] == "<think>\nhm 1\n</think>\n\nthe first<|im_end|>"
    assert second[1] == "<think>\nhm 3\n</think>\n\nthe second<|im_end|>"
    assert "hm 1" not in second[0] and "the first" in second[0]


def test_what_a_template_is_told_is_told_when_it_asks_too(encode):
    row = {"messages": TURNS[:4], "chat_template_kwargs": {"enable_thinking": False}}
    encoded, tokenizer = encode(templates.THINKING, row)
    for read, answer in answers(encoded, tokenizer):
        assert read.endswith("assistant\n<think>\n\n</think>\n\n")
        assert "think" not in answer


@pytest.mark.parametrize(
    ("content", "more", "thought"),
    [
        ("plain", {}, "<|begin|><think>\n\n</think>\n\nplain<|end|>"),
        ("so\n</think>\n\nplain", {}, "<|begin|><think>\nso\n</think>\n\nplain<|end|>"),
        ("<think>\nso\n</think>\n\nplain", {}, "<|begin|><think>\nso\n</think>\n\nplain<|end|>"),
        ("plain", {"reasoning_content": "so"}, "<|begin|><think>\nso\n</think>\n\nplain<|end|>"),
    ],
)
def test_a_thought_that_the_template_opens_is_closed(encode, content, more, thought):
    messages = [TURNS[0], {"role": "assistant", "content": content, **more}]
    encoded, tokenizer = encode(templates.OPENING, {"messages": messages})
    ((read, answer),) = answers(encoded, tokenizer)
    assert read == "<|im_start|>one<|begin|><think>\n"
    assert (read + answer).removeprefix("<|im_start|>one") == thought
    assert any("empty one" in note for note in encoded.notes) == (thought.count("so") == 0)


@pytest.mark.parametrize("name", ["MARKERS", "MARKS_NO_END"])
def test_a_turn_without_an_end_is_refused_and_can_be_given_one(encode, name):
    template = getattr(templates, name)
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: .*chat template .*never learn to stop.*sft\.eos"
    ):
        encode(template, {"messages": TURNS})
    encoded, tokenizer = encode(template, {"messages": TURNS}, eos="<|end|>")
    wanted = ["the first<|end|>", "the second<|end|>", "the third<|end|>"]
    assert [answer for _, answer in answers(encoded, tokenizer)] == wanted
    for number, (read, _) in zip((1, 3, 5), answers(encoded, tokenizer), strict=True):
        assert read == tokenizer.apply_chat_template(
            TURNS[:number], tokenize=False, add_generation_prompt=True
        )
    assert encoded.ends == {tokenizer.eos_token_id}


def test_an_end_that_stands_behind_the_marks_is_learned_where_it_stands(encode):
    encoded, tokenizer = encode(templates.MARKS_NO_END, {"messages": TURNS}, eos="<|im_end|>")
    (datum,) = encoded.data
    assert learned(datum, tokenizer) == "the first<|im_end|>the second<|im_end|>the third<|im_end|>"
    plain, _ = encode(CHATML, {"messages": TURNS})
    assert sequence(datum) == sequence(plain.data[0])


def test_a_template_that_ends_only_some_turns_is_told(encode):
    some = templates.MARKERS.replace(
        "{% endfor %}", "{% if 'end' in m.content %}<|im_end|>{% endif %}{% endfor %}"
    )
    rows = [
        {"messages": TURNS[:2]},
        {"messages": [TURNS[0], {"role": "assistant", "content": "end"}]},
    ]
    with pytest.raises(DataError, match="never learn to stop"):
        encode(some, rows[:1])
    encoded, _ = encode(some, rows, ends=[3])
    assert [("does not learn to stop there" in note) for note in encoded.notes] == [True]


def test_a_template_s_refusal_is_the_row_s(encode):
    with pytest.raises(DataError, match=r"d\.jsonl:2: .*System role not supported"):
        encode(templates.NO_SYSTEM, [{"messages": TURNS}, {"messages": [SYSTEM, *TURNS]}])


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"default": None}}}


def test_tools_and_calls_are_those_of_the_template(encode):
    messages = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "tool",
            "content": [{"type": "text", "text": "bl"}, {"type": "text", "text": "ue"}],
        },
        {"role": "assistant", "content": "blue"},
    ]
    row = {"messages": messages, "tools": [LOOK]}
    encoded, tokenizer = encode(templates.TOOLS, row)
    (datum,) = encoded.data
    joined = [*messages[:2], {"role": "tool", "content": "blue"}, messages[3]]
    text = tokenizer.apply_chat_template(joined, tools=[LOOK], tokenize=False)
    assert tokenizer.decode(sequence(datum)) == text
    assert learned(datum, tokenizer) == '<call>look{"at": "sky"}</call><|im_end|>blue<|im_end|>'
    assert encoded.notes == []


def test_what_a_template_does_not_use_is_told_or_refused(encode):
    row = {"messages": TURNS[:2], "tools": [LOOK], "documents": [{"text": "x"}], "id": 7}
    encoded, _ = encode(CHATML, [row, row])
    assert [note.partition(": ")[2] for note in encoded.notes] == [
        "not used: 'id'",
        "the chat template makes no use of 'documents'",
        "the chat template makes no use of 'tools'",
    ]
    calling = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(DataError, match="has 'tool_calls', and the chat template has no place"):
        encode(CHATML, {"messages": calling})


def test_prompt_and_completion_as_messages(encode):
    row = {"prompt": TURNS[:3], "completion": TURNS[3:4]}
    encoded, tokenizer = encode(CHATML, row)
    (datum,) = encoded.data
    assert learned(datum, tokenizer) == "the second<|im_end|>"
    whole, _ = encode(CHATML, {"messages": TURNS[:4]})
    assert sequence(datum) == sequence(whole.data[0])
    marked, tokenizer = encode(templates.MARKS_THE_HEADER, row)
    assert learned(marked.data[0], tokenizer) == "the second<|im_end|>"


def test_another_template_in_place_of_the_tokenizer_s(encode):
    encoded, tokenizer = encode(None, {"messages": TURNS[:2]}, chat_template=CHATML)
    assert learned(encoded.data[0], tokenizer) == "the first<|im_end|>"
    prompt = Encoder(tokenizer, chat_template=CHATML).prompt("one", chat=True)
    assert prompt == sequence(encoded.data[0])[: len(prompt)]
    with pytest.raises(DataError, match="the chat template refuses the prompt"):
        Encoder(tokenizer, chat_template="{{ 1 / 0 }}").prompt("one", chat=True)


def test_an_end_is_one_token_of_the_vocabulary(encode):
    pair = {"prompt": "a", "completion": "b"}
    encoded, tokenizer = encode(CHATML, pair, eos="<|im_end|>")
    assert learned(encoded.data[0], tokenizer) == "b<|im_end|>"
    with pytest.raises(ConfigError, match=r"sft\.eos is '<\|fin\|>', which is not one token"):
        encode(CHATML, pair, eos="<|fin|>")


def test_a_token_that_the_model_lacks_is_named_with_its_line(encode):
    rows = [{"prompt": "a", "completion": "a"}, {"prompt": "reverse", "completion": "a"}]
    tokenizer = make_tokenizer()
    (a,), merged = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", "reverse"))
    assert a < max(merged)  # or the test could not tell
    said = rf"d\.jsonl:2: has the token {max(merged)} \('.*'\), and the model has {max(merged)}"
    with pytest.raises(DataError, match=said):
        encode(CHATML, rows, vocab_size=max(merged))
    encode(CHATML, rows, vocab_size=max(merged) + 1)
