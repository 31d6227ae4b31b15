"""An adapter's text format says how its texts became tokens, so that prompts become the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TextFormat:
    """A `TextFormat` is recorded with an adapter, and used wherever the adapter answers.

    Attributes:
        stop: tokens that end its answers; () = the base's.
        chat_template: template in place of the tokenizer's; None = the tokenizer's.
    """

    stop: tuple[int, ...] = ()
    chat_template: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as files hold them."""
        return {"stop": list(self.stop), "chat_template": self.chat_template}

    @classmethod
    def of_json(cls, value: object) -> "TextFormat":
        """Read a value of a file; one that says nothing, or something else, gives the base's."""
        if not isinstance(value, Mapping):
            return cls()
        stop, template = value.get("stop"), value.get("chat_template")
        listed = stop if isinstance(stop, list) else []
        tokens = tuple(t for t in listed if isinstance(t, int) and not isinstance(t, bool))
        return cls(tokens, template if isinstance(template, str) and template else None)
