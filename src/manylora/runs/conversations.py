"""Conversations are cut into what leads up to an assistant's turn and the turn itself.

A turn is what the template adds to the text with which it asks for that turn, up to the token that
ends it. As long as a template only ever adds to the text, one datum holds all turns of a
conversation. Some templates rewrite what came before (they drop earlier thoughts, or move the
system's text into the last question): a turn that no longer stands as it would be asked for begins
a datum of its own, in which the turns before it are read and not learned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from manylora.runs.chat_template import ChatTemplate, Span, TemplateRefusal
from manylora.runs.data_rows import Example, Message
from manylora.types import DataError

_OPEN, _CLOSE = "<think>", "</think>"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

_NOTHING = "the chat template leaves no token of the assistant to learn in messages[{number}]"

# Said once per source.
Tell = Callable[[str], None]


@dataclass(slots=True)
class TextPiece:
    """A `TextPiece` is text that is tokenised by itself.

    Attributes:
        turn: number of the message that it is a part of and that is learned; None = context.
        last: it is the last learned part of that turn.
    """

    text: str
    turn: int | None = None
    last: bool = False


@dataclass(slots=True)
class _Turn:
    """A `_Turn` is an assistant's turn as it would be asked for.

    Attributes:
        number: of its message.
        text: the conversation up to the turn's end.
        learned: which parts of `text` are learned.
    """

    number: int
    text: str
    learned: list[Span]


@dataclass(slots=True)
class _Group:
    """A `_Group` is turns that share a datum: the text up to the last one's end holds them all."""

    text: str
    turns: list[_Turn] = field(default_factory=list)


class Conversations:
    """`Conversations` cuts conversations by a chat template."""

    def __init__(self, template: ChatTemplate, tell: Tell):
        """Take a template; `tell` is told of what a row says and the template does not use."""
        self._template, self._tell = template, tell

    def cut(self, example: Example) -> list[list[TextPiece]]:
        """Return the pieces of each datum that a conversation becomes. Raises DataError if the
        template cannot render it, or not so that a turn can be told apart."""
        self._check_use(example)
        groups: list[_Group] = []
        marked = 0
        for number, message in enumerate(example.messages):
            # Marks are counted through all of the conversation.
            if message.role != "assistant" or (number < example.given and not self._template.marks):
                continue
            try:
                asking = self._template.render(
                    example.messages[:number], example.options, asking=True
                )
                if self._template.marks:
                    turn, marked = self._marked(example, number, asking, marked)
                else:
                    turn = self._added(example, number, asking)
            except TemplateRefusal as error:
                raise DataError(f"the chat template refuses it: {error}") from error
            if number < example.given:
                continue
            # What stands before the turn when it is asked for.
            seen = turn.text if self._template.marks else asking
            if not groups or not seen.startswith(groups[-1].text):
                groups.append(_Group(""))
            groups[-1].text = turn.text
            groups[-1].turns.append(turn)
        return [list(_pieces(group)) for group in groups]

    def _added(self, example: Example, number: int, asking: str) -> _Turn:
        """A turn is what the template adds to the text that asks for it."""
        full = self._without_closing(
            self._template.render(example.messages[: number + 1], example.options), example
        )
        if not full.startswith(asking):
            full = asking + self._answer_behind(example, number, asking, full)
        if full == asking:
            raise DataError(_NOTHING.format(number=number))
        return _Turn(number, full, [(len(asking), len(full))])

    def _marked(self, example: Example, number: int, asking: str, marked: int) -> tuple[_Turn, int]:
        """A turn is what the template marks of the message, without what it is asked with."""
        full, spans = self._template.render_marked(example.messages[: number + 1], example.options)
        full = self._without_closing(full, example)
        begin = len(asking) if full.startswith(asking) else 0
        cut = [(max(start, begin), min(end, len(full))) for start, end in spans[marked:]]
        learned = [(start, end) for start, end in cut if start < end]
        if not learned and number >= example.given:
            raise DataError(_NOTHING.format(number=number))
        return _Turn(number, full, learned), len(spans)

    def _without_closing(self, text: str, example: Example) -> str:
        shape = self._template.shape(example.options)
        return text if shape is None else text.removesuffix(shape.closing)

    def _answer_behind(self, example: Example, number: int, asking: str, full: str) -> str:
        """Return an answer as it would follow the text that asks for it, if that text ends in
        something which the template leaves out once the answer is there."""
        shape = self._template.shape(example.options)
        opening = "" if shape is None else shape.opening
        header = asking.removesuffix(opening)
        if not opening or not asking.endswith(opening) or not full.startswith(header):
            raise DataError(
                f"the chat template renders messages[{number}] otherwise than by adding it to the "
                "text that asks for it, so it cannot be told which tokens are the assistant's; "
                "give such conversations as prompt/completion rows, or another chat_template"
            )
        answer = full[len(header) :]
        if _OPEN not in opening or _CLOSE in opening:
            return answer
        if _CLOSE in answer:
            return answer.lstrip().removeprefix(_OPEN)
        return self._thought(example.messages[number], opening) + answer.lstrip("\n")

    def _thought(self, message: Message, opening: str) -> str:
        """Return the thought that the template opens for the model, and its end."""
        content = message.content or ""
        written = next((message.more[name] for name in _THOUGHTS if name in message.more), "")
        if not written and _CLOSE in content:
            written = content.rpartition(_CLOSE)[0].strip().removeprefix(_OPEN)
        begin = "" if opening.endswith("\n") else "\n"
        if written.strip():
            return f"{begin}{written.strip()}\n{_CLOSE}\n\n"
        self._tell(
            "the chat template asks with an open <think>; answers without a thought are learned "
            "with an empty one"
        )
        return f"{begin}\n{_CLOSE}\n\n"

    def _check_use(self, example: Example) -> None:
        """Say what the template has no use for; refuse what would be lost of an answer."""
        source = self._template.source
        names = {*example.options, *(key for m in example.messages for key in m.more)}
        for name in sorted(name for name in names if source and name not in source):
            if name == "tool_calls":
                raise DataError(
                    "has 'tool_calls', and the chat template has no place for them; give a "
                    "chat_template that has, or write them into the content"
                )
            self._tell(f"the chat template makes no use of {name!r}")


def _pieces(group: _Group) -> Iterator[TextPiece]:
    """Return the text of a group, cut at the edges of what is learned."""
    at = 0
    for turn in group.turns:
        for place, (start, end) in enumerate(turn.learned, start=1):
            if start > at:
                yield TextPiece(group.text[at:start])
            yield TextPiece(group.text[start:end], turn.number, place == len(turn.learned))
            at = end
    if at < len(group.text):
        yield TextPiece(group.text[at:])
