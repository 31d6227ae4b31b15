"""Which tokens an example becomes, and which of them are learned."""

import json

import numpy as np
import pytest
from tokenizers import processors

from manylora.runs.encode import Encoder
from manylora.runs.sources import read_source
from manylora.types import DataError
from tests.unit.runs.small_tokenizer import make_tokenizer


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def source(*rows: dict):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_source("d.jsonl")

    return source


def encode_source(source, tokenizer):
    return Encoder(tokenizer).encode(source).data


def sequence(datum) -> list[int]:
    """All tokens, the last target included."""
    return [*datum.tokens.tolist(), int(datum.loss_inputs["target_tokens"][-1])]


def learned(datum, tokenizer) -> str:
    """The text of the tokens that have weight."""
    weights = datum.loss_inputs["weights"]
    assert set(np.unique(weights)) <= {0.0, 1.0}
    return tokenizer.decode(datum.loss_inputs["target_tokens"][weights == 1.0])


def test_prompt_and_completion_are_tokenised_apart(source, tokenizer):
    (datum,) = encode_source(source({"prompt": "rev", "completion": "erse"}), tokenizer)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    eos = tokenizer.eos_token_id
    assert ids("rev") + ids("erse") != ids("reverse")  # or the test could not tell
    assert sequence(datum) == [*ids("rev"), *ids("erse"), eos]
    assert learned(datum, tokenizer) == "erse<|end|>"
    # The first learned prediction is made at the prompt's last token.
    assert datum.loss_inputs["weights"].tolist() == [0.0] * (len(ids("rev")) - 1) + [1.0] * (
        len(ids("erse")) + 1
    )


def test_a_bos_stands_in_front_where_the_tokenizer_adds_one(source, tokenizer, bos_tokenizer):
    rows = source({"prompt": "a", "completion": "b"})
    (without,) = encode_source(rows, tokenizer)
    (with_bos,) = encode_source(rows, bos_tokenizer)
    assert sequence(with_bos) == [bos_tokenizer.bos_token_id, *sequence(without)]
    assert learned(with_bos, bos_tokenizer) == "b<|end|>"


@pytest.mark.parametrize(
    ("single", "front"),
    [("<|im_start|> <|begin|> $A", [2, 1]), ("$A <|end|>", []), ("<|begin|> $A <|end|>", [1])],
)
def test_what_a_tokenizer_puts_around_a_text(source, single, front):
    tokenizer = make_tokenizer()
    names = ("<|end|>", "<|begin|>", "<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    ids = tokenizer("one", add_special_tokens=False)["input_ids"]
    assert Encoder(tokenizer).prompt("one") == [*front, *ids]
    (pair,) = encode_source(source({"prompt": "one", "completion": "one"}), tokenizer)
    assert sequence(pair) == [*front, *ids, *ids, tokenizer.eos_token_id]
    (text,) = encode_source(source({"text": "one"}), tokenizer)
    assert sequence(text) == [*front, *ids, tokenizer.eos_token_id]


def test_an_empty_prompt(source, tokenizer, bos_tokenizer):
    rows = source({"prompt": "", "completion": "zq"})
    assert learned(encode_source(rows, bos_tokenizer)[0], bos_tokenizer) == "zq<|end|>"
    # Without a BOS nothing predicts the very first token.
    assert learned(encode_source(rows, tokenizer)[0], tokenizer) == "q<|end|>"


def test_texts_are_learned_but_for_their_first_token(source, tokenizer, bos_tokenizer):
    rows = source({"text": "xyz"})
    assert learned(encode_source(rows, tokenizer)[0], tokenizer) == "yz<|end|>"
    assert learned(encode_source(rows, bos_tokenizer)[0], bos_tokenizer) == "xyz<|end|>"


def test_an_end_that_is_written_out_is_not_doubled(source, tokenizer):
    plain, written = encode_source(source({"text": "xyz"}, {"text": "xyz<|end|>"}), tokenizer)
    assert sequence(plain) == sequence(written)


def test_many_rows_keep_their_order_across_chunks(source, tokenizer, monkeypatch):
    monkeypatch.setattr("manylora.runs.encode.CHUNK", 3)
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(8)]
    data = encode_source(source(*rows), tokenizer)
    assert [tokenizer.decode(sequence(d)) for d in data] == [f"p{n}c{n}<|end|>" for n in range(8)]


def test_a_completion_without_tokens_is_named(source, tokenizer):
    class Silent:
        """A tokenizer that has no token for a blank."""

        eos_token_id, bos_token_id = tokenizer.eos_token_id, None

        def __call__(self, texts, **options):
            if isinstance(texts, str):
                return tokenizer(texts, **options)
            return {"input_ids": [tokenizer(t.strip(), **options)["input_ids"] for t in texts]}

    rows = source({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "})
    with pytest.raises(DataError, match=r"d\.jsonl:2: the text to learn has no tokens"):
        encode_source(rows, Silent())


def test_a_lone_token_is_named(source, tokenizer):
    with pytest.raises(DataError, match=r"d\.jsonl:1: is a single token"):
        encode_source(source({"text": "<|end|>"}), tokenizer)


def test_a_tokenizer_without_an_end_is_refused(source):
    class Endless:
        eos_token_id: int | None = None

    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_source(source({"text": "a"}), Endless())


# --- messages ---------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def test_assistant_turns_and_their_ends_are_learned(source, tokenizer):
    (datum,) = encode_source(source({"messages": TURNS}), tokenizer)
    assert tokenizer.decode(sequence(datum)) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n"
    )
    assert learned(datum, tokenizer) == "two<|im_end|>four<|im_end|>"


def test_what_follows_the_last_assistant_turn_is_left_away(source, tokenizer):
    more = [*TURNS, {"role": "user", "content": "five"}]
    plain, longer = encode_source(source({"messages": TURNS}, {"messages": more}), tokenizer)
    assert sequence(plain) == sequence(longer)


def test_special_tokens_within_an_answer_do_not_end_its_loss(source, tokenizer_with_template):
    no_end = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizer_with_template(no_end)
    turns = [TURNS[1], {"role": "assistant", "content": "a<|im_end|>b"}]
    (datum,) = Encoder(tokenizer, eos="<|end|>").encode(source({"messages": turns})).data
    assert learned(datum, tokenizer) == "a<|im_end|>b<|end|>"


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] }}<|im_end|>{%- endgeneration -%}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)


def test_a_template_s_own_marks_are_used(source, tokenizer, tokenizer_with_template):
    marked = tokenizer_with_template(GENERATION)
    rows = source({"messages": TURNS})
    (by_marks,), (by_prefix,) = encode_source(rows, marked), encode_source(rows, tokenizer)
    assert learned(by_marks, marked) == "two<|im_end|>four<|im_end|>"
    assert sequence(by_marks) == sequence(by_prefix)
    assert by_marks.loss_inputs["weights"].tolist() == by_prefix.loss_inputs["weights"].tolist()


OTHERWISE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length }}?{% endif %}"
)
PICKY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
MUTE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (OTHERWISE, r"renders messages\[2\] otherwise"),
        (PICKY, "refuses it: no system here"),
        (MUTE, "leaves no token of the assistant"),
    ],
)
def test_a_template_that_cannot_be_followed_is_named(
    source, tokenizer_with_template, template, said
):
    rows = source({"messages": TURNS})
    with pytest.raises(DataError, match=rf"d\.jsonl:1: the chat template {said}"):
        encode_source(rows, tokenizer_with_template(template))


def test_messages_need_a_template(source, tokenizer_with_template):
    with pytest.raises(DataError, match=r"d\.jsonl: has messages, but .* no chat template"):
        encode_source(source({"messages": TURNS}), tokenizer_with_template(None))


# --- prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
def test_a_prompt_is_what_training_had_before_the_answer(source, request, which):
    tokenizer = request.getfixturevalue(which)
    (datum,) = encode_source(source({"prompt": "reverse abc", "completion": "cba"}), tokenizer)
    first_learned = int(np.argmax(datum.loss_inputs["weights"])) + 1
    assert Encoder(tokenizer).prompt("reverse abc") == sequence(datum)[:first_learned]


def test_a_chat_prompt_ends_where_the_answer_begins(source, tokenizer):
    (datum,) = encode_source(source({"messages": TURNS[1:3]}), tokenizer)
    first_learned = int(np.argmax(datum.loss_inputs["weights"])) + 1
    assert Encoder(tokenizer).prompt("one", chat=True) == sequence(datum)[:first_learned]
