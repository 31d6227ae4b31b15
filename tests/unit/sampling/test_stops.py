"""Stop strings: seen at the token that completes them, whatever the tokens' borders."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from manylora.engine import Engine
from manylora.models import resolve_base
from manylora.sampling.stops import StopStrings
from manylora.types import AdapterSpec, Opening, Sample, SamplingParams, Unsupported
from tests.laws.tenants import must, perturb

pytestmark = pytest.mark.usefixtures("threads")
TEXTS = [
    "The garden is near the museum.\n\nUser: what?",
    "naïve café — 東京 👩‍👩‍👧 🙂🙂 ok",
    "one STOP two",
    "🙂",
    "ééééé\u0301",
]


class Bytes:
    """A tokenizer of single bytes: every character but ASCII needs several tokens."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return bytes(tokens).decode(errors="replace")


class Spaced:
    """Words that carry a space before them, which decoding strips at the beginning."""

    WORDS = ("a", "b", "ab", "stop", "")

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(" " + self.WORDS[t] if self.WORDS[t] else "" for t in tokens).lstrip(" ")


@pytest.fixture(scope="module")
def seedling() -> Any:
    return AutoTokenizer.from_pretrained(resolve_base("seedling"))


def first_stop(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> int | None:
    """The obvious way: decode all there is after every token."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(
            tokens[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if any(string in text for string in strings):
            return count
    return None


def found_stop(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> int | None:
    stops = StopStrings(tokenizer, strings)
    return next((i for i, token in enumerate(tokens, 1) if stops.ends_with(token)), None)


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3))
def test_bytes(text: str, strings: list[str]):
    tokens = list(text.encode(errors="ignore"))
    assert found_stop(Bytes(), tokens, strings) == first_stop(Bytes(), tokens, strings)


@given(
    st.lists(st.integers(0, 255), max_size=40),
    st.lists(st.sampled_from(["a", "ab", "é", "€", "🙂", "\n"]), min_size=1, max_size=3),
)
def test_bytes_that_are_no_text(tokens: list[int], strings: list[str]):
    assert found_stop(Bytes(), tokens, strings) == first_stop(Bytes(), tokens, strings)


@given(
    st.lists(st.integers(0, 4), max_size=30),
    st.sampled_from(["a b", "b a", "stop", "ab s", " a", "p st", "a a a a"]),
)
def test_a_tokens_text_depends_on_those_before_it(tokens: list[int], string: str):
    assert found_stop(Spaced(), tokens, [string]) == first_stop(Spaced(), tokens, [string])


@pytest.mark.parametrize("text", TEXTS)
def test_seedlings_own_tokenizer(seedling: Any, text: str):
    tokens = seedling(text)["input_ids"]
    for start in range(len(text)):
        for length in (1, 2, 7):
            strings = [text[start : start + length]]
            assert found_stop(seedling, tokens, strings) == first_stop(seedling, tokens, strings)


def test_random_tokens(seedling: Any):
    rng = random.Random(0)
    for _ in range(100):
        tokens = [rng.randrange(len(seedling)) for _ in range(30)]
        whole = seedling.decode(tokens)
        start = rng.randrange(len(whole))
        strings = [whole[start : start + rng.randint(1, 9)] or "x"]
        assert found_stop(seedling, tokens, strings) == first_stop(seedling, tokens, strings)


def test_a_special_tokens_text_stops_too(seedling: Any):
    end = seedling.eos_token_id
    assert found_stop(seedling, [50, end], [seedling.decode([end])]) == 2


def test_a_long_answer_decodes_a_few_tokens_at_a_time():
    lengths: list[int] = []

    class Counting(Bytes):
        def decode(self, tokens: Sequence[int], **options: Any) -> str:
            lengths.append(len(tokens))
            return super().decode(tokens, **options)

    stops = StopStrings(Counting(), ["never"])
    for token in b"word " * 400 + b"\xf0" * 400:
        assert not stops.ends_with(token)
    assert max(lengths) < 200


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine(Opening("seedling"))
    engine.create("a", AdapterSpec(rank=4))
    perturb(engine, "a")
    return engine


@pytest.mark.parametrize("adapter", [None, "a"])
def test_the_answer_ends_with_the_token_that_completes_it(engine: Engine, adapter: str | None):
    tokenizer = engine.base.tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("The garden", "A tiger", "reverse: abc")]

    def answers(**settings: Any) -> tuple[Any, ...]:
        params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, **settings)
        sample = Sample(adapter=adapter, prompts=prompts, params=params, num_samples=2)
        return must(engine.sample([sample]))[0].sequences

    for free in answers(stop=()):
        text = tokenizer.decode(free.tokens)
        string = text[len(text) // 2 : len(text) // 2 + 3]
        for other, whole in zip(
            answers(stop=(), stop_strings=(string,)), answers(stop=()), strict=True
        ):
            count = first_stop(tokenizer, whole.tokens, [string])
            assert other.tokens == whole.tokens[:count]
            assert other.logprobs == whole.logprobs[:count]
            assert other.stop_reason == ("stop" if count else "length")


def test_a_base_without_tokenizer_cannot_see_strings(tiny):
    engine = Engine(Opening(str(tiny("llama"))))
    params = SamplingParams(stop_strings=("x",))
    (error,) = engine.sample([Sample(adapter=None, prompts=[[3]], params=params)])
    assert isinstance(error, Unsupported) and "tokenizer" in str(error)
