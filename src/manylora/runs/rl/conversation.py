"""A conversation goes on behind what was sampled, whose tokens stay what they were.

What a template writes between an answer and the next one is found by rendering with a marker in
the answer's place: what stands behind the marker is tokenised and put behind the sampled ids. Some
templates rewrite what came before (they drop a thought, or move the system's text): there the
conversation is tokenised as the template shows it, and begins a sequence of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manylora.runs.chat_template import TemplateRefusal
from manylora.runs.data_rows import Message
from manylora.runs.encode import Encoder
from manylora.types import DataError

_MARKER = "Zq7Quagga7qZ"


class Continuation(tuple[int, ...]):
    """A `Continuation` is token ids for the next answer, and the conversation that they are of."""

    messages: tuple[Message, ...] | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class AnsweredTurn:
    """An `AnsweredTurn` is a request and its answer.

    Attributes:
        prompt: token ids.
        tokens: sampled ids.
        answer: their text, without the token that ended them.
        messages: what was asked, if it was a conversation.
        text: what was asked, if it was a text.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    answer: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """These are the request's ids and the answer's."""
        return self.prompt + self.tokens


class Dialogue:
    """A `Dialogue` makes token ids of what a hook asks with."""

    def __init__(self, encoder: Encoder, options: Mapping[str, Any]):
        """Take how texts become tokens, and what the row tells the chat template."""
        self._encoder, self._options = encoder, options

    def of_text(self, text: str, turns: Sequence[AnsweredTurn]) -> Continuation:
        """Return a text's ids; of one that goes on behind an answer, only what is new is made."""
        for turn in reversed(turns):
            if turn.text is not None and text.startswith(turn.text + turn.answer):
                rest = text[len(turn.text) + len(turn.answer) :]
                return self._made(turn.ids + self._bare(rest), text=text)
        return self._made((*self._encoder.front(), *self._bare(text)), text=text)

    def of_messages(
        self, messages: Sequence[Message], turns: Sequence[AnsweredTurn]
    ) -> Continuation:
        """Return a conversation's ids; those of an answer of ours stay what was sampled."""
        asked = tuple(messages)
        for turn in reversed(turns):
            size = len(turn.messages or ())
            if not size or len(asked) < size + 2 or asked[:size] != turn.messages:
                continue
            if asked[size] == Message("assistant", turn.answer):
                return self.behind(turn, asked[size + 1 :])
        return self._made(self._bare(self._encoder.asking(asked, self._options)), messages=asked)

    def behind(self, turn: AnsweredTurn, following: Sequence[Message]) -> Continuation:
        """Return the ids for the next answer once these turns follow an answer."""
        assert turn.messages is not None
        asked = (*turn.messages, Message("assistant", turn.answer), *following)
        marked = [replace(m) for m in asked]
        marked[len(turn.messages)] = Message("assistant", _MARKER)
        shown = self._encoder.asking(asked, self._options)
        try:
            before, found, after = self._encoder.template.render(
                marked, self._options, asking=True
            ).partition(_MARKER)
        except TemplateRefusal:
            found = before = after = ""
        asking = self._encoder.asking(turn.messages, self._options)
        # As the request was: perhaps without what a template only writes when it asks, or with a
        # blank that an answer begins with.
        stays = found and (asking.startswith(before) or before.rstrip() == asking.rstrip())
        texts = {(start + answer + after) for start in (before, asking) for answer in _as(turn)}
        if not stays or shown not in texts:
            return self._made(self._bare(shown), messages=asked)
        bridge = self._bare(after)
        if turn.tokens and bridge[:1] == turn.tokens[-1:]:
            bridge = bridge[1:]  # it ended its turn itself
        return self._made(turn.ids + bridge, messages=asked)

    def behind_text(self, ids: Sequence[int], text: str) -> Continuation:
        """Return ids with a text behind them, as it stands."""
        return self._made((*ids, *self._bare(text)))

    def _bare(self, text: str) -> tuple[int, ...]:
        return tuple(next(iter(self._encoder.tokens([text])))) if text else ()

    def _made(
        self,
        ids: Sequence[int],
        *,
        messages: tuple[Message, ...] | None = None,
        text: str | None = None,
    ) -> Continuation:
        if wrong := self._encoder.unknown(ids):
            raise DataError(f"the prompt {wrong}")
        made = Continuation(ids)
        made.messages, made.text = messages, text
        return made


def _as(turn: AnsweredTurn) -> tuple[str, str]:
    """Return an answer as it is, and as templates trim it."""
    return turn.answer, turn.answer.strip()
