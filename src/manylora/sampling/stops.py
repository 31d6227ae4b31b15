"""An answer's text is watched for stop strings, a token at a time."""

from collections.abc import Sequence
from typing import Any

# What a tokenizer writes for bytes that are no whole character (yet).
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# So many tokens without a whole character at their end are no text.
LONGEST_WAIT = 64


class StopStrings:
    """`StopStrings` watch one answer.

    A token's text depends on the tokens before it, and a character may need several, so what is
    decoded begins at a place where the text was whole, one such place back.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]):
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._keep = max(map(len, strings)) - 1
        self._tokens: list[int] = []
        self._settled = 0  # tokens whose text is in `_tail`
        self._tail = ""  # the end of the settled text, as far as a stop string may begin in it
        self._settled_text = ""  # text of all `_tokens` before `_settled`

    def ends_with(self, token: int) -> bool:
        """Say whether this next token completes a stop string."""
        self._tokens.append(token)
        text = self._text(self._tokens)
        shared = _shared(self._settled_text, text)
        fresh = text[shared:]
        seen = self._tail + fresh
        if any(string in seen for string in self._strings):
            return True
        whole = fresh and not text.endswith(INCOMPLETE)
        if whole or len(self._tokens) - self._settled > LONGEST_WAIT:
            self._tail = seen[max(0, len(seen) - self._keep) :] if self._keep else ""
            self._tokens = self._tokens[self._settled :]
            self._settled = len(self._tokens)
            self._settled_text = self._text(self._tokens)
        return False

    def _text(self, tokens: Sequence[int]) -> str:
        exactly = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(tokens, **exactly))


def _shared(one: str, other: str) -> int:
    """Return the length of the common beginning."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
