"""Examples as token sequences with a weight for each token.

- prompt and completion are tokenised apart, so that a prompt alone, as at sampling, has the very
  tokens that were trained; the loss is on the completion and the end-of-sequence token.
- text: the loss is on every token but the first, and on the end-of-sequence token.
- messages: rendered by the tokenizer's chat template; the loss is on what the assistant has to say
  itself, up to and including the token that ends its turn.

A beginning-of-sequence token stands in front where the tokenizer adds one by itself (a chat
template writes its own). Nothing is cut: an example that is too long for the base is refused there.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from manylora.runs.sources import Example, Source
from manylora.types import DataError, Datum, causal_datum

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

# Tokenised at once: long enough for the tokenizer's threads, short enough to hold in memory.
CHUNK = 1024


def encode_source(source: Source, tokenizer: Any) -> list[Datum]:
    """One datum per example, in the order of the source.

    Args:
        source: examples of one kind.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        DataError: an example without any token to learn, or that the chat template cannot render;
            names file and line. Or a tokenizer that lacks what this kind of data needs.
    """
    if source.kind == "messages":
        return _encode_messages(source, tokenizer)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "the base's tokenizer has no end-of-sequence token, so an adapter could not learn when "
            "to stop; set eos_token in its tokenizer_config.json"
        )
    bos = _bos(tokenizer)
    data: list[Datum] = []
    for examples in _chunks(source.examples):
        # prompt, completion, prompt, completion, …; or the texts.
        flat = _tokenise(tokenizer, [text for example in examples for text in example.texts])
        for example in examples:
            pieces = [next(flat) for _ in example.texts]
            prompt, learned = (pieces[0] if len(pieces) == 2 else []), pieces[-1]
            if not learned:
                raise DataError(f"{source.place(example)}: the text to learn has no tokens")
            end = [] if learned[-1] == eos else [eos]
            tokens = [*bos, *prompt, *learned, *end]
            context = len(bos) + len(prompt)
            weights = [0.0] * context + [1.0] * (len(tokens) - context)
            if len(tokens) < 2:
                raise DataError(
                    f"{source.place(example)}: is a single token, which nothing predicts"
                )
            data.append(causal_datum(tokens, weights))
    return data


def encode_prompt(tokenizer: Any, text: str, *, chat: bool = False) -> list[int]:
    """One prompt as training would have seen it: bare, or as a user's turn of a conversation."""
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    bos = [] if chat else _bos(tokenizer)
    return [*bos, *next(_tokenise(tokenizer, [text]))]


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), CHUNK):
        yield examples[start : start + CHUNK]


def _tokenise(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    if not texts:
        return iter(())
    return iter(
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    )


def _bos(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer itself puts one in front."""
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    added = len(with_special) > len(without) and with_special[0] == bos
    return [bos] if bos is not None and added else []


@dataclass(slots=True)
class _Conversation:
    """Text in alternation: what leads up to an assistant's turn, and the turn."""

    example: Example
    pieces: list[str] = field(default_factory=list)


def _encode_messages(source: Source, tokenizer: Any) -> list[Datum]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            f"{source.name}: has messages, but the base's tokenizer has no chat template; use "
            "prompt/completion rows, or a base that was made for conversations"
        )
    if isinstance(template, str) and _GENERATION.search(template):
        return [_by_mask(source, example, tokenizer) for example in source.examples]
    enders = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    data: list[Datum] = []
    for examples in _chunks(source.examples):
        conversations = [_split_turns(source, example, tokenizer) for example in examples]
        flat = _tokenise(tokenizer, [piece for each in conversations for piece in each.pieces])
        for conversation in conversations:
            pieces = list(islice(flat, len(conversation.pieces)))
            tokens: list[int] = []
            weights: list[float] = []
            for number, piece in enumerate(pieces):
                learned = _turn_length(piece, enders, tokenizer) if number % 2 else 0
                tokens += piece
                weights += [1.0] * learned + [0.0] * (len(piece) - learned)
            data.append(_datum(source, conversation.example, tokens, weights))
    return data


def _turn_length(piece: list[int], enders: set[int], tokenizer: Any) -> int:
    """Tokens of a turn up to the special one that ends it; the line break that a template writes
    after that one is never sampled."""
    for end in range(len(piece), 0, -1):
        if piece[end - 1] in enders:
            return end
        if tokenizer.decode(piece[end - 1 : end]).strip():
            break
    return len(piece)


def _split_turns(source: Source, example: Example, tokenizer: Any) -> _Conversation:
    """Cut a conversation before and after each assistant turn.

    A turn is what the template adds to the text with which it would ask for that turn. Each of
    these texts must begin with the one before; else what is trained would not be what is sampled.
    """
    conversation = _Conversation(example)
    text = ""
    for number, message in enumerate(example.messages):
        if message.role != "assistant":
            continue
        for end, asking in ((number, True), (number + 1, False)):
            longer = _render(source, example, tokenizer, end, asking=asking)
            if not longer.startswith(text):
                raise DataError(_prefix_complaint(source, example, number, asking=asking))
            conversation.pieces.append(longer[len(text) :])
            text = longer
    return conversation


def _prefix_complaint(source: Source, example: Example, number: int, *, asking: bool) -> str:
    what = (
        f"rewrites earlier turns once messages[{number - 1}] follows them"
        if asking
        else f"renders messages[{number}] otherwise than by adding it to the text that asks for it"
    )
    return (
        f"{source.place(example)}: the chat template {what}, so the tokens of the assistant's "
        "turns cannot be told apart; give each such conversation as prompt/completion rows, or "
        "use a template that marks them with {% generation %}"
    )


def _render(source: Source, example: Example, tokenizer: Any, end: int, *, asking: bool) -> str:
    turns = [{"role": m.role, "content": m.content} for m in example.messages[:end]]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asking)
    # A template is a program of its own and may raise anything, by its author's words.
    except Exception as error:
        raise DataError(
            f"{source.place(example)}: the chat template refuses it: {error}"
        ) from error
    assert isinstance(text, str)
    return text


def _by_mask(source: Source, example: Example, tokenizer: Any) -> Datum:
    """By the template's own `{% generation %}` marks."""
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    try:
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:
        raise DataError(
            f"{source.place(example)}: the chat template refuses it: {error}"
        ) from error
    weights = [float(mark) for mark in encoded["assistant_masks"]]
    return _datum(source, example, encoded["input_ids"], weights)


def _datum(source: Source, example: Example, tokens: list[int], weights: list[float]) -> Datum:
    if not any(weights[1:]):
        raise DataError(
            f"{source.place(example)}: the chat template leaves no token of the assistant to learn"
        )
    return causal_datum(tokens, weights)
