"""Token ids become text for people: whole, or a piece for each token.

What is shown is what was trained: special tokens are text like any other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from manylora.runs.run_folder import RunPaths
from manylora.types import BaseModelError

# What a tokenizer writes in the place of bytes that are no character (yet).
_TORN = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes; what is still torn after so many tokens stays so.
_MOST_TORN = 4


class TokenTexts:
    """`TokenTexts` are those of one tokenizer; without one, ids are shown as numbers."""

    def __init__(self, tokenizer: Any | None):
        """Keep the tokenizer; None = there is none."""
        self._tokenizer = tokenizer
        # By the token before and the token itself, on which a piece depends.
        self._pieces: dict[tuple[int, ...], str] = {}

    def whole(self, ids: Sequence[int]) -> str:
        """Return the text of ids that follow each other."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int], start: int, stop: int) -> list[str]:
        """Return what each of the ids from `start` to `stop` adds to the text before it.

        Where several tokens make one character, the last of them has it and the others have "".
        """
        if self._tokenizer is None:
            return [f"{one} " for one in ids[start:stop]]
        return list(self._added(ids, start, stop))

    def _added(self, ids: Sequence[int], start: int, stop: int) -> Iterator[str]:
        first = start
        for place in range(start, stop):
            piece = self._piece(tuple(ids[max(0, first - 1) : place + 1]), place + 1 - first)
            last = place + 1 == stop or place + 1 - first == _MOST_TORN
            if piece.endswith(_TORN) and not last:
                yield ""
                continue
            yield piece
            first = place + 1

    def _piece(self, ids: tuple[int, ...], size: int) -> str:
        """Return what the last `size` of the ids add to those before."""
        key = (size, *ids)
        if key not in self._pieces:
            before = self.whole(ids[: len(ids) - size]) if len(ids) > size else ""
            text = self.whole(ids)
            # A token alone loses the blank before it with some tokenizers; behind another, not.
            alone = not text.startswith(before)
            added = self.whole(ids[-size:]) if alone else text.removeprefix(before)
            self._pieces[key] = added
        return self._pieces[key]


def texts_of(paths: RunPaths) -> TokenTexts:
    """Return the texts of the tokenizer of a run's base; of none, if it cannot be opened here."""
    try:
        base = yaml.safe_load(paths.run_yaml.read_text(encoding="utf-8"))["base"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        return TokenTexts(None)
    # Looking at what was sampled must not wait for a tokenizer when there is nothing to look at.
    from manylora.models.base import resolve_base
    from manylora.models.tokenizer import open_tokenizer

    try:
        return TokenTexts(open_tokenizer(resolve_base(str(base))))
    except BaseModelError:
        return TokenTexts(None)
