"""Prompts are rows of a file; what is not the prompt goes to the reward.

    {"prompt": "2+2=", "answer": "4"}
    {"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}

A `prompt` may be a list of messages, too. The columns `tools`, `documents` and
`chat_template_kwargs` are handed to the chat template as well.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manylora.runs.data_rows import (
    Message,
    described,
    read_messages,
    refuse_prompt_beside,
    template_options,
)
from manylora.runs.sources import ROWS_BETWEEN, place_of, read_rows
from manylora.types import DataError

PROMPT_FORMS = (
    'a row is {"prompt": …} or {"messages": [{"role": …, "content": …}, …]}, and has any other '
    "columns for the reward"
)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A `PromptRow` is one prompt, and what its row says besides.

    Attributes:
        number: 0, 1, … among the prompts.
        place: where it stands (`data/words.jsonl:7`).
        text: the prompt, where it is a text.
        messages: the prompt, where it is a conversation.
        options: what the chat template is told besides.
        columns: all other columns.
        tokens: of the prompt, ready to be continued; () before it was tokenised.
    """

    number: int
    place: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()

    @property
    def chat(self) -> bool:
        """The prompt is a conversation."""
        return bool(self.messages)

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """This is the prompt as functions of users see it: a text, or messages."""
        if not self.messages:
            return self.text
        return [message.for_template() for message in self.messages]

    def for_hook(self) -> dict[str, Any]:
        """Return the row as a hook is given it, all its own."""
        prompt = {"prompt": self.prompt, **({"messages": self.prompt} if self.chat else {})}
        return copy.deepcopy({**self.columns, **prompt})


@dataclass(frozen=True, slots=True)
class PromptRows:
    """`PromptRows` are all prompts of a source.

    Attributes:
        columns: of any of the rows, without the prompt.
    """

    name: str
    rows: Sequence[PromptRow]
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def require(self, columns: Sequence[str], whose: str) -> None:
        """Raise DataError if a row lacks one of these columns; null stands for absent.

        Args:
            whose: who asks for them, for the message.
        """
        for row in self.rows:
            for column in columns:
                if row.columns.get(column) is None:
                    there = ", ".join(row.columns) or "none"
                    raise DataError(
                        f"{row.place}: has no column {column!r}, which {whose} asks for; it has "
                        f"{there}"
                    )

    def check_steps(self, groups: int) -> None:
        """Raise DataError if there are fewer prompts than the groups of one step."""
        if len(self.rows) < groups:
            raise DataError(
                f"{self.name}: has {len(self.rows)} prompts, and a step takes groups: {groups}, so "
                f"there are 0 whole steps in them; give at least {groups} prompts, or groups: "
                f"{len(self.rows)} for 1 step an epoch"
            )


def read_prompts(
    source: str, *, name: str | None = None, between: Callable[[], None] | None = None
) -> PromptRows:
    """Read and check every row; nothing is tokenised, so no base is needed.

    Args:
        source: a local file or a hub id, as those of `sft.train`.
        name: what messages call it.
        between: called every few rows.

    Raises:
        DataError: nothing there, or a row that is wrong; names the file and the line.
    """
    name = source if name is None else name
    unit, rows = read_rows(source, name, PROMPT_FORMS)
    found: list[PromptRow] = []
    columns: dict[str, None] = {}
    for line, row in rows:
        if between is not None and len(found) % ROWS_BETWEEN == ROWS_BETWEEN - 1:
            between()
        place = place_of(name, unit, line)
        try:
            found.append(_prompt_row(len(found), place, row))
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        columns.update(dict.fromkeys(found[-1].columns))
    if not found:
        raise DataError(f"{name}: has no rows; {PROMPT_FORMS}")
    return PromptRows(name, found, tuple(columns))


def _prompt_row(number: int, place: str, row: object) -> PromptRow:
    if not isinstance(row, Mapping):
        raise DataError(f"is {described(row)}, not an object; {PROMPT_FORMS}")
    given = [field for field in ("prompt", "messages") if row.get(field) is not None]
    if len(given) != 1:
        what = "has prompt and messages" if given else "has neither prompt nor messages"
        raise DataError(f"{what}; {PROMPT_FORMS}")
    (key,) = given
    value = row[key]
    chat = key == "messages" or not isinstance(value, str)
    refuse_prompt_beside(row, chat=chat)
    columns = {str(name): one for name, one in row.items() if name not in ("prompt", "messages")}
    if not chat:
        if not value:
            raise DataError(f"{key!r} is empty; drop the row")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{key!r} has half of a surrogate pair at character {error.start + 1}; write the "
                "whole character"
            ) from error
        return PromptRow(number, place, text=value, columns=columns)
    messages = read_messages(key, value, learned=False)
    if messages[-1].role == "assistant":
        raise DataError(
            f"{key!r} ends with a turn of the assistant, which is what is sampled; leave it out, "
            "or put what is expected into a column for the reward"
        )
    return PromptRow(
        number, place, messages=messages, options=template_options(row), columns=columns
    )
