"""A chat template is asked what it makes of a conversation, and what it does at a turn's end.

A template is a program. How it ends a turn is not written anywhere, so it is asked: it renders a
small conversation with an answer whose text is known, once with the answer last and once with a
turn behind it. What stands behind the answer in both is the turn's end; what stands only behind a
last one (Phi-3 closes the whole conversation so) is never sampled and must not be learned.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manylora.runs.data_rows import Message

# `{% generation %}` marks what is learned.
_MARK = "generation"
_ANSWER = "Zebra"
_QUESTION = Message("user", "Quagga")

Span = tuple[int, int]


class TemplateRefusal(Exception):
    """The template could not render a conversation; the message is in its own words."""


@dataclass(frozen=True, slots=True)
class TurnShape:
    """A `TurnShape` is what a template does around an answer.

    Attributes:
        opening: what it writes when it asks for an answer and leaves out where it shows one (an
            open `<think>`, say).
        closing: what it writes only behind the last turn of a conversation.
        end: the token that ends a turn; None if none does.
    """

    opening: str = ""
    closing: str = ""
    end: int | None = None


class ChatTemplate:
    """A `ChatTemplate` is the chat template of a tokenizer, or another one in its place.

    Attributes:
        text: the other one.
        source: text of the one in use, as far as it is one text.
        name: what to call it.
        exists: whether there is any.
        marks: whether it says itself what is learned.
        special: control tokens.
        added: those, and others that were added to the vocabulary.
    """

    def __init__(self, tokenizer: Any, text: str | None = None):
        """Take `text`, a Jinja template; None = the tokenizer's own."""
        self._tokenizer, self.text = tokenizer, text
        self._shapes: dict[str, TurnShape | None] = {}
        own = getattr(tokenizer, "chat_template", None)
        self.name = "the base's chat template" if text is None else "the given chat_template"
        self.exists = bool(text or own)
        self.source = text or (own.get("default", "") if isinstance(own, dict) else own or "")
        # As transformers looks for it, but with every way in which Jinja trims blanks.
        tags = self.source.split("{%")[1:]
        self.marks = any(tag.strip("-+ \n\t").startswith(_MARK) for tag in tags)
        special = set(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.added = special | set(added)
        self.special = special | {number for number, token in added.items() if token.special}

    def render(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, asking: bool = False
    ) -> str:
        """Return a conversation as text; with `asking`, up to where the next answer begins. Raises
        TemplateRefusal if it cannot be rendered."""
        turns = [message.for_template() for message in messages]
        chosen: dict[str, str] = {} if self.text is None else {"chat_template": self.text}
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=asking, **chosen, **options
            )
            text.encode("utf-8")
        # A template may raise anything, by its author's words.
        except Exception as error:
            raise TemplateRefusal(str(error) or type(error).__name__) from error
        return str(text)

    def render_marked(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        """Return a conversation as text, and what the template marks with `{% generation %}`.
        Raises TemplateRefusal if it cannot be rendered."""
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [message.for_template() for message in messages]
        tools = options.get("tools")
        given = {**self._tokenizer.special_tokens_map, **options}
        try:
            texts, spans = render_jinja_template(
                conversations=[turns],
                chat_template=self._tokenizer.get_chat_template(self.text, tools),
                return_assistant_tokens_mask=True,
                **given,
            )
            texts[0].encode("utf-8")
        except Exception as error:
            raise TemplateRefusal(str(error) or type(error).__name__) from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def shape(self, options: Mapping[str, Any]) -> TurnShape | None:
        """Return what the template does around an answer; None if it cannot be told."""
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in self._shapes:
            self._shapes[key] = self._asked(options)
        return self._shapes[key]

    def _asked(self, options: Mapping[str, Any]) -> TurnShape | None:
        answer = Message("assistant", _ANSWER)
        try:
            asking = self.render([_QUESTION], options, asking=True)
            last = self.render([_QUESTION, answer], options)
            middle = self.render([_QUESTION, answer, _QUESTION], options)
        except TemplateRefusal:
            return None
        if _ANSWER not in last or _ANSWER not in middle:
            return None
        before, _, after_last = last.rpartition(_ANSWER)
        _, _, after_middle = middle.rpartition(_ANSWER)
        opening = ""
        if not last.startswith(asking):
            if not asking.startswith(before):
                return None
            opening = asking.removeprefix(before)
        kept, end = self._turn_end(after_last, after_middle)
        return TurnShape(opening, after_last[kept:], end)

    def _turn_end(self, last: str, middle: str) -> tuple[int, int | None]:
        """Return how much of the text behind a last answer is its turn's, and its end token."""
        shared = next(
            (n for n, (a, b) in enumerate(zip(last, middle, strict=False)) if a != b),
            min(len(last), len(middle)),
        )
        whole = self._ids(last)
        # The common text may end within a token.
        while shared and self._ids(last[:shared]) + self._ids(last[shared:]) != whole:
            shared -= 1
        ends = [token for token in self._ids(last[:shared]) if token in self.added]
        if ends:
            return shared, ends[-1]
        # A turn that ends otherwise when it is the last: that is how it ends when it is sampled.
        for length in range(shared, len(last) + 1):
            ends = [token for token in self._ids(last[:length]) if token in self.added]
            if ends and self._ids(last[:length]) + self._ids(last[length:]) == whole:
                return length, ends[0]
        return shared, None

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
