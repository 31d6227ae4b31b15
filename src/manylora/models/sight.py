"""A token's sight of its own sequence is taken from the masks that a model asks for.

Models tell an attention function their window as an argument, as a mask, or both; transformers' own
attention follows the mask. So ours is registered with a maker of masks, which writes down what a
mask would have shown.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface

from manylora.types import Unsupported

NAME = "manylora"

# The parts of a mask by the names of their functions in transformers (`masking_utils`). The stream
# keeps sequences apart by itself.
CAUSAL = "causal_mask_function"
PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
WINDOW = "sliding_window_overlay.<locals>.inner_mask"
CHUNK = "chunked_overlay.<locals>.inner_mask"
BOTH = "and_masks.<locals>.and_mask"


@dataclass(frozen=True, slots=True)
class Sight:
    """A token sees itself and earlier tokens of its sequence, but for those out of its sight.

    Attributes:
        window: it sees so many tokens at most, itself included.
        chunk: it sees no token of an earlier chunk of so many tokens.
    """

    window: int | None = None
    chunk: int | None = None

    def covers(self, length: int) -> bool:
        """Return whether nothing is out of sight in a sequence of that length."""
        return all(size is None or size >= length for size in (self.window, self.chunk))

    def seen(self, query_Q: Tensor, key_K: Tensor) -> Tensor:
        """Return bool: whether each position's query sees the key at each; shapes broadcast."""
        back = query_Q - key_K
        seen = back >= 0
        if self.window is not None:
            seen = seen & (back < self.window)
        if self.chunk is not None:
            seen = seen & (query_Q // self.chunk == key_K // self.chunk)
        return seen

    def __getitem__(self, _: Any) -> "Sight":
        # Models cut a mask to the number of keys.
        return self


def make_sight(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **asked: Any
) -> Sight:
    """Make what a model gets for a mask; the arguments are those of transformers' mask makers.
    Raises Unsupported: a mask of another kind than causal, with or without a window or chunks."""
    parts = {part.__qualname__ for part in _parts(mask_function)}
    unknown = parts - {CAUSAL, PACKED, WINDOW, CHUNK}
    padded = attention_mask is not None and not bool(attention_mask.all())
    if unknown or CAUSAL not in parts or {WINDOW, CHUNK} <= parts or padded:
        raise Unsupported(
            f"its attention mask is not causal alone, with a window or in chunks "
            f"({', '.join(sorted(unknown)) or 'it asks for padding or both'})"
        )
    size = asked.get("local_size")
    if (size is None) == bool(parts & {WINDOW, CHUNK}):
        raise Unsupported(f"its attention mask does not tell its size ({size})")
    return Sight(size if WINDOW in parts else None, size if CHUNK in parts else None)


def _parts(function: Any) -> Iterator[Any]:
    """Return the functions whose conjunction a mask function is."""
    if getattr(function, "__qualname__", None) != BOTH:
        yield function
        return
    held = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    for part in held["mask_functions"].cell_contents:
        yield from _parts(part)


AttentionMaskInterface.register(NAME, make_sight)
