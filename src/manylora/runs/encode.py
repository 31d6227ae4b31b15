"""Examples become token sequences with a weight for each token.

- prompt and completion are tokenised apart, so that a prompt alone, as at sampling, has the very
  tokens that were trained; the loss is on the completion and the end-of-sequence token.
- text: the loss is on every token but the first, and on the end-of-sequence token.
- messages: rendered by the chat template; the loss is on what the assistant has to say itself, up
  to and including the token that ends its turn (`conversations` cuts them).

What the tokenizer itself puts in front of a text stands in front here, too (a chat template writes
its own beginning). Nothing is cut: an example that is too long for the base is refused there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from manylora.runs.chat_template import ChatTemplate, TemplateRefusal
from manylora.runs.conversations import Conversations, TextPiece
from manylora.runs.data_rows import Example, Message
from manylora.runs.sources import Source
from manylora.types import ConfigError, DataError, Datum, causal_datum

# Tokenised at once: long enough for the tokenizer's threads, short enough to hold in memory.
CHUNK, CHUNK_CHARACTERS = 1024, 1 << 18

# Called between two pieces of a long job, so that others may have their turn.
Between = Callable[[], None]


def nothing() -> None:
    """Do nothing: no other work waits."""


@dataclass(slots=True)
class Encoded:
    """An `Encoded` is a source as data.

    Attributes:
        data: in the order of the source; a conversation may have become several.
        owners: the number of the example that each is of.
        ends: tokens that were learned as the end of an answer.
        notes: what a user should know, each thing once.
    """

    data: list[Datum] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def tell(self, note: str) -> None:
        """Note something, unless it is there already."""
        if note not in self.notes:
            self.notes.append(note)


class Encoder:
    """An `Encoder` makes data of examples, and of prompts what training would have seen of them.

    Attributes:
        eos: the token that ends an answer which has no end of its own; None if none is known.
        template: the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos: str | None = None,
        chat_template: str | None = None,
        ends: Sequence[int] = (),
        vocab_size: int | None = None,
        between: Between = nothing,
    ):
        """Choose how to encode.

        Args:
            tokenizer: a Hugging Face tokenizer.
            eos: text of the token that ends an answer; None = the tokenizer's, else the first of
                `ends`.
            chat_template: in place of the tokenizer's own.
            ends: tokens at which the base ends its answers.
            vocab_size: tokens that the base knows; None = any.
            between: called every few examples, while the tokenizer is not in use.

        Raises:
            ConfigError: `eos` is not one token of the vocabulary.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._between = between
        self.template = ChatTemplate(tokenizer, chat_template)
        self._chosen = None if eos is None else _one_token(tokenizer, eos)
        own = getattr(tokenizer, "eos_token_id", None)
        first = next(iter(ends), None)
        self.eos: int | None = next((e for e in (self._chosen, own, first) if e is not None), None)
        self._ends = {token for token in (self._chosen, own, *ends) if token is not None}
        self._front: list[int] | None = None

    def prompt(self, text: str, *, chat: bool = False) -> list[int]:
        """Return a prompt as training would have seen it: bare, or as a user's turn. Raises
        DataError if the chat template cannot render it."""
        if not chat:
            return [*self.front(), *next(self._tokenise([text]))]
        try:
            asking = self.template.render([Message("user", text)], {}, asking=True)
        except TemplateRefusal as error:
            raise DataError(f"the chat template refuses the prompt: {error}") from error
        return next(self._tokenise([asking]))

    def asking(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """Return a conversation as text up to where the next answer begins.

        Raises:
            DataError: there is no chat template, or it cannot render it.
        """
        if not self.template.exists:
            raise DataError(
                "has messages, but the base's tokenizer has no chat template; give one with "
                "chat_template, use text prompts, or use a base that was made for conversations"
            )
        try:
            return self.template.render(messages, options, asking=True)
        except TemplateRefusal as error:
            raise DataError(f"the chat template refuses it: {error}") from error

    def tokens(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Return the tokens of texts as they stand, with nothing in front, a text at a time."""
        for start in range(0, len(texts), CHUNK):
            yield from self._tokenise(list(texts[start : start + CHUNK]))
            self._between()

    def answer_ends(self, options: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """Return the tokens that end an answer without any data: the base's, and the one by which
        the chat template ends a turn that it was told `options` with; None = of a bare text."""
        shape = None if options is None else self.template.shape(options)
        ends = self._ends if shape is None or shape.end is None else self._ends | {shape.end}
        return tuple(sorted(ends))

    def unknown(self, tokens: Sequence[int]) -> str:
        """Return what is wrong with tokens that the model lacks; "" = it knows them all."""
        largest = max(tokens, default=0)
        if self._vocab_size is None or largest < self._vocab_size:
            return ""
        return (
            f"has the token {largest} ({self._tokenizer.decode([largest])!r}), and the model has "
            f"{self._vocab_size:,}, numbered from 0: its tokenizer was given tokens that its "
            "embedding lacks; use the tokenizer that it was trained with, or leave the token out"
        )

    def encode(self, source: Source) -> Encoded:
        """Encode every example of a source.

        Raises:
            DataError: an example without any token to learn, with a token that the base lacks, or
                that the chat template cannot render; names file and line. Or something that this
                kind of data needs is missing: an end, or a chat template.
        """
        encoded = Encoded()
        if source.ignored:
            columns = ", ".join(map(repr, source.ignored))
            encoded.tell(f"{source.name}: not used: {columns}")
        encode = self._conversations if source.kind == "messages" else self._texts
        encode(source, encoded)
        return encoded

    def stops(self, encoded: Encoded) -> tuple[int, ...]:
        """Return the tokens that end an answer of an adapter that has learned these data."""
        return tuple(sorted(self._ends | encoded.ends))

    def front(self) -> list[int]:
        """Return what the tokenizer itself puts in front of a text."""
        if self._front is None:
            whole = list(self._tokenizer("a")["input_ids"])
            bare = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])
            places = range(len(whole) - len(bare) + 1)
            found = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
            self._front = whole[:found]
        return self._front

    # -- prompt/completion and text ---------------------------------------------------------------

    def _texts(self, source: Source, encoded: Encoded) -> None:
        eos = self.eos
        if eos is None:
            raise DataError(
                "the base's tokenizer has no end-of-sequence token, and its files name none, so an "
                "adapter could not learn when to stop; name one with sft.eos, or set eos_token in "
                "its tokenizer_config.json"
            )
        front = self.front()
        encoded.ends.add(eos)
        for first, examples in _chunks(source.examples, self._between):
            # prompt, completion, prompt, completion, …; or the texts.
            flat = self._tokenise([text for example in examples for text in example.texts])
            for number, example in enumerate(examples, start=first):
                pieces = [next(flat) for _ in example.texts]
                prompt, learned = (pieces[0] if len(pieces) == 2 else []), pieces[-1]
                if not learned:
                    raise DataError(f"{source.place(example)}: the text to learn has no tokens")
                end = [] if learned[-1] == eos else [eos]
                tokens = [*front, *prompt, *learned, *end]
                context = len(front) + len(prompt)
                weights = [0.0] * context + [1.0] * (len(tokens) - context)
                if len(tokens) < 2:
                    raise DataError(
                        f"{source.place(example)}: is a single token, which nothing predicts"
                    )
                self._add(encoded, source, number, tokens, weights)

    # -- messages ---------------------------------------------------------------------------------

    def _conversations(self, source: Source, encoded: Encoded) -> None:
        if not self.template.exists:
            raise DataError(
                f"{source.name}: has messages, but the base's tokenizer has no chat template; give "
                "one with chat_template, use prompt/completion rows, or a base that was made for "
                "conversations"
            )
        conversations = Conversations(
            self.template, lambda note: encoded.tell(f"{source.name}: {note}")
        )
        endless: list[str] = []
        for first, examples in _chunks(source.examples, self._between):
            cut: list[list[list[TextPiece]]] = []
            for example in examples:
                try:
                    cut.append(conversations.cut(example))
                except DataError as error:
                    raise DataError(f"{source.place(example)}: {error}") from error
            flat = self._tokenise([p.text for groups in cut for group in groups for p in group])
            for number, (example, groups) in enumerate(zip(examples, cut, strict=True), first):
                for group in groups:
                    assembly = _Assembly(list(group), list(islice(flat, len(group))))
                    for tokens, weights in self._assembled(example, assembly, encoded):
                        if not any(weights[1:]):
                            raise DataError(
                                f"{source.place(example)}: the chat template leaves no token of "
                                "the assistant to learn"
                            )
                        self._add(encoded, source, number, tokens, weights)
                    endless += [f"{source.place(example)}: messages[{n}]" for n in assembly.endless]
        self._check_ends(endless, encoded)

    def _assembled(
        self, example: Example, assembly: "_Assembly", encoded: Encoded
    ) -> Iterator[tuple[list[int], list[float]]]:
        """Return the tokens and weights of a group of turns: one sequence, unless a turn has to be
        given an end that does not stand in the conversation."""
        tokens: list[int] = []
        weights: list[float] = []
        end_follows = False
        for place, (piece, ids) in enumerate(zip(assembly.pieces, assembly.tokens, strict=True), 1):
            learned, ended = len(ids) if piece.turn is not None else int(end_follows), True
            end_follows = False
            if piece.turn is not None and piece.last:
                learned, ended = self._turn_length(example, piece.turn, ids)
                if ended:
                    encoded.ends.add(ids[learned - 1])
            tokens += ids
            weights += [1.0] * learned + [0.0] * (len(ids) - learned)
            if ended:
                continue
            if self._chosen is None:
                assembly.endless.append(piece.turn or 0)
                continue
            encoded.ends.add(self._chosen)
            following = assembly.tokens[place] if place < len(assembly.tokens) else []
            if following[:1] == [self._chosen]:
                end_follows = True
            else:
                kept = len(tokens) - self._blank_end(ids)
                yield [*tokens[:kept], self._chosen], [*weights[:kept], 1.0]
                weights = [0.0] * len(tokens)
        if any(weights):
            yield tokens, weights

    def _turn_length(self, example: Example, number: int, ids: list[int]) -> tuple[int, bool]:
        """Return how many tokens a turn has up to the one that ends it, and whether there is one.
        The line break that a template writes after it is never sampled."""
        shape = self.template.shape(example.options)
        content = (example.messages[number].content or "").rstrip()
        for length in range(len(ids), 0, -1):
            token = ids[length - 1]
            if token in self._ends or (shape is not None and token == shape.end):
                return length, True
            text = self._tokenizer.decode([token])
            # Whatever special token the template itself puts last. Where it has no end at all, one
            # that stands there is a part of the answer.
            written = token in self.template.special and not content.endswith(text)
            if written and (shape is None or shape.end is not None):
                return length, True
            if text.strip():
                break
        return len(ids), False

    def _blank_end(self, ids: list[int]) -> int:
        count = 0
        while count < len(ids) - 1 and not self._tokenizer.decode([ids[-1 - count]]).strip():
            count += 1
        return count

    def _check_ends(self, endless: Sequence[str], encoded: Encoded) -> None:
        if not endless:
            return
        where = (
            "has a {% generation %} block that leaves the end of the assistant's turn out"
            if self.template.marks
            else "writes no token that ends the assistant's turn"
        )
        remedy = (
            "name the token that is to end it with sft.eos, or give a chat_template that writes one"
        )
        told = f"{endless[0]}: {self.template.name} {where}, so the adapter"
        if not encoded.ends:
            raise DataError(f"{told} would never learn to stop; {remedy}")
        encoded.tell(
            f"{told} does not learn to stop there (nor in {len(endless) - 1} other turns); {remedy}"
        )

    # -- both -------------------------------------------------------------------------------------

    def _add(
        self,
        encoded: Encoded,
        source: Source,
        number: int,
        tokens: list[int],
        weights: list[float],
    ) -> None:
        if wrong := self.unknown(tokens):
            raise DataError(f"{source.place(source.examples[number])}: {wrong}")
        encoded.data.append(causal_datum(tokens, weights))
        encoded.owners.append(number)

    def _tokenise(self, texts: list[str]) -> Iterator[list[int]]:
        if not texts:
            return iter(())
        ids = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return iter(ids["input_ids"])


@dataclass(slots=True)
class _Assembly:
    """An `_Assembly` is a group of turns: its pieces, their tokens, and which turns have no end."""

    pieces: list[TextPiece]
    tokens: list[list[int]]
    endless: list[int] = field(default_factory=list)


def _chunks(
    examples: Sequence[Example], between: Between
) -> Iterator[tuple[int, Sequence[Example]]]:
    start = size = 0
    for end, example in enumerate(examples):
        length = _length(example)
        if end > start and (end - start == CHUNK or size + length > CHUNK_CHARACTERS):
            yield start, examples[start:end]
            between()
            start, size = end, 0
        size += length
    if start < len(examples):
        yield start, examples[start:]


def _length(example: Example) -> int:
    turns = sum(len(message.content or "") for message in example.messages)
    return turns + sum(map(len, example.texts))


def _one_token(tokenizer: Any, text: str) -> int:
    """Return the token that is written so."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) != 1 or (ids[0] == unknown and text != getattr(tokenizer, "unk_token", None)):
        parts = [tokenizer.decode([token]) for token in ids[:8]]
        raise ConfigError(
            f"sft.eos is {text!r}, which is not one token of the base's vocabulary (it is read as "
            f"{parts}); name one of its special tokens"
        )
    return int(ids[0])
