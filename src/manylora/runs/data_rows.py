"""Each row of a data source is checked; it is of one of three kinds, and a source has only one.

    {"prompt": "2+2=", "completion": "4"}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"text": "2+2=4"}

Prompt and completion may be lists of messages, too: a conversation of which the completion is
learned. With messages, the columns `tools`, `documents` and `chat_template_kwargs` are handed to
the chat template. Other columns are ignored, and the source says which.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from manylora.types import DataError

Kind = Literal["prompt/completion", "messages", "text"]
FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
FORMS = (
    'a row is {"prompt": …, "completion": …}, {"messages": [{"role": …, "content": …}, …]} or '
    '{"text": …}'
)
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")

# Columns of other programs that say what the prompt is, or what is learned of it; leaving them out
# would train something else than the row says.
_NO_TEXT = ("image", "images", "audio", "audios", "video", "videos")
_CHANGES_MEANING = {
    "system": "put it into messages, as a turn of role 'system'",
    "functions": "call it tools, in the form that the chat template expects",
    "function_call": "write it as tool_calls of a message",
    "chosen": "preferences cannot be trained here; keep the answer that is to be learned",
    "rejected": "preferences cannot be trained here; keep the answer that is to be learned",
    "weight": "weights of rows are not supported; drop the rows that shall not be learned",
    "weights": "weights of rows are not supported; drop the rows that shall not be learned",
    "loss_mask": "it cannot be given by hand; use prompt/completion rows",
    **dict.fromkeys(_NO_TEXT, "only text can be trained"),
}

# What templates know of a message beside its role and content.
_OF_A_MESSAGE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
# Arguments of `apply_chat_template` and of the rendering itself, which a row may not set: one of
# them would even choose another template.
_RESERVED = frozenset(
    {"self", "conversation", "conversations", "messages", "tools", "documents", "chat_template"}
    | {"compiled_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"}
)


@dataclass(frozen=True, slots=True)
class Message:
    """A `Message` is one turn of a conversation.

    Attributes:
        content: None = the row has none (a call of a tool, say).
        more: what else the row says of it, such as `tool_calls`.
    """

    role: str
    content: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """Return the message as a chat template takes it."""
        content = {} if self.content is None else {"content": self.content}
        return {"role": self.role, **content, **self.more}


@dataclass(frozen=True, slots=True)
class Example:
    """An `Example` is a row of `texts`, prompt and completion or the text, or else of `messages`.

    Attributes:
        given: messages at the beginning of which none is learned.
        options: what the chat template is told besides: tools, documents, and any names of the
            template's own.
    """

    line: int
    texts: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    given: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


def kind_of(row: object) -> Kind:
    """Return which kind a row is of. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"is {described(row)}, not an object; {FORMS}")
    # Parquet and the hub give every column to every row; null stands for absent.
    present = {key for key, value in row.items() if value is not None}
    complete = [kind for kind, fields in FIELDS.items() if present.issuperset(fields)]
    if len(complete) == 1:
        return "messages" if _both_areread_messages(row, complete[0]) else complete[0]
    if complete:
        raise DataError(f"is {' and '.join(complete)} at once; keep the fields of one kind")
    if "completion" in present or "prompt" in present:
        missing = "prompt" if "completion" in present else "completion"
        raise DataError(f"has no {missing!r}; {FORMS}")
    have = f"has only {', '.join(map(repr, sorted(map(str, row))))}" if row else "is empty"
    raise DataError(f"{have}; {FORMS}")


def _both_areread_messages(row: Mapping[str, Any], kind: Kind) -> bool:
    return kind == "prompt/completion" and all(
        isinstance(row[name], Sequence) and not isinstance(row[name], str | bytes)
        for name in FIELDS[kind]
    )


def ignored_columns(row: Mapping[str, Any], kind: Kind) -> set[str]:
    """Return the columns that say something and are not used. Raises DataError if the row would
    mean something else without one of them."""
    used = {*FIELDS[kind], *(("prompt", "completion", *TEMPLATE_COLUMNS) * (kind == "messages"))}
    others = {str(key) for key, value in row.items() if value is not None and key not in used}
    for name in sorted(others):
        if name in _CHANGES_MEANING:
            raise DataError(f"has {name!r}, which would be left out; {_CHANGES_MEANING[name]}")
        if name in TEMPLATE_COLUMNS and row[name]:
            raise DataError(
                f"has {name!r}, which only a chat template can use; give prompt and completion as "
                "messages, or write what it says into the prompt"
            )
    return others - set(TEMPLATE_COLUMNS)


def refuse_prompt_beside(row: Mapping[str, Any], *, chat: bool) -> None:
    """Raise DataError where a column says what the prompt is and would not get into it."""
    for name in ("system", "functions", *_NO_TEXT):
        if row.get(name) is not None:
            raise DataError(f"has {name!r}, which would be left out; {_CHANGES_MEANING[name]}")
    for name in TEMPLATE_COLUMNS:
        if row.get(name) and not chat:
            raise DataError(
                f"has {name!r}, which only a chat template can use; give the prompt as messages, "
                "or write what it says into the prompt"
            )


def read_example(line: int, kind: Kind, row: Mapping[str, Any]) -> Example:
    """Return a row as an example, checked. Raises DataError."""
    if kind == "messages":
        return _conversation(line, row)
    texts = tuple(_text(repr(field), row[field]) for field in FIELDS[kind])
    if not texts[-1]:
        field = FIELDS[kind][-1]
        raise DataError(f"{field!r} is empty, so there is nothing to learn; drop the row")
    return Example(line, texts=texts)


def row_of(kind: Kind, example: Example) -> dict[str, Any]:
    """Return the row that an example was read from, but for columns that are ignored."""
    if kind != "messages":
        return dict(zip(FIELDS[kind], example.texts, strict=True))
    turns = [message.for_template() for message in example.messages]
    row: dict[str, Any] = {"messages": turns}
    if example.given:
        row = {"prompt": turns[: example.given], "completion": turns[example.given :]}
    named = {k: v for k, v in example.options.items() if k not in ("tools", "documents")}
    lists = {k: v for k, v in example.options.items() if k in ("tools", "documents")}
    return {**row, **lists, **({"chat_template_kwargs": named} if named else {})}


def without_nulls(value: Any) -> Any:
    """Return a value without what is null in it: tables give every key to every object."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def described(value: object) -> str:
    """Say what a value is, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}" if value else "an empty string"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"binary data ({len(value)} bytes)"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return "a list" if len(value) else "an empty list"
    return f"a {type(value).__name__}"


# -- conversations --------------------------------------------------------------------------------


def _conversation(line: int, row: Mapping[str, Any]) -> Example:
    if row.get("messages") is not None:
        given, messages = 0, read_messages("messages", row["messages"])
    else:
        prompt = read_messages("prompt", row["prompt"])
        given, messages = len(prompt), (*prompt, *read_messages("completion", row["completion"]))
    if all(message.role != "assistant" for message in messages[given:]):
        where = "messages" if not given else "completion"
        raise DataError(f"{where!r} has no turn of role 'assistant', so there is nothing to learn")
    return Example(line, messages=messages, given=given, options=template_options(row))


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row tells the chat template besides its turns. Raises DataError."""
    options: dict[str, Any] = {}
    named = row.get("chat_template_kwargs")
    if named:
        named = _parsed("chat_template_kwargs", named)
        if not isinstance(named, Mapping):
            raise DataError(f"'chat_template_kwargs' is {described(named)}; it must be an object")
        for name in named:
            if name in _RESERVED or not str(name).isidentifier():
                raise DataError(f"'chat_template_kwargs' may not set {str(name)[:40]!r}")
        options.update(named)
    for name in ("tools", "documents"):
        value = row.get(name)
        if not value:
            continue
        value = _parsed(name, value)
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise DataError(f"{name!r} is {described(value)}; it must be a list of objects")
        options[name] = value
    return options


def _parsed(name: str, value: object) -> object:
    """Parse a value that is text, as tables often hold it: each row's has a shape of its own."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name!r} is text that is not JSON: {error}") from error


def read_messages(name: str, value: object, *, learned: bool = True) -> tuple[Message, ...]:
    """Return a list of turns, checked.

    Args:
        name: what messages call it.
        learned: the assistant's turns are trained, so one that is empty is refused.

    Raises:
        DataError: it is no list of turns, or one of them is wrong.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(
            f"{name!r} is {described(value)}; it must be a list of "
            '{"role": …, "content": …} that is not empty'
        )
    return tuple(_message(f"{name}[{number}]", item, learned) for number, item in enumerate(value))


def _message(where: str, item: object, learned: bool) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {described(item)}; it must be {{'role': …, 'content': …}}")
    if item.get("role") is None:
        raise DataError(f"{where} has no 'role'; it must be {{'role': …, 'content': …}}")
    role = _text(f"{where}.role", item["role"])
    if not role:
        raise DataError(f"{where}.role is empty; write system, user or assistant")
    more = _more(where, item)
    content = _content(f"{where}.content", item.get("content"))
    if content is None and not more.get("tool_calls"):
        raise DataError(f"{where} has no 'content'; it must be {{'role': …, 'content': …}}")
    if learned and role == "assistant" and not content and not any(more.values()):
        raise DataError(f"{where}.content is empty, so there is nothing to learn")
    if content is None and "content" in item:
        more["content"] = None  # written out, and a template may tell it from one that is missing
    return Message(role, content, more)


def _more(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    for key, value in item.items():
        # A weight of 0 says something, too.
        if key in ("role", "content") or (not value and key not in ("weight", "train")):
            continue
        if key not in _OF_A_MESSAGE:
            raise DataError(
                f"{where} has {str(key)[:40]!r}, which is not supported; keep role, content, "
                f"{', '.join(_OF_A_MESSAGE)}"
            )
        checked = _calls if key == "tool_calls" else _text
        more[key] = checked(f"{where}.{key}", value)
    return more


def _calls(where: str, value: object) -> object:
    if isinstance(value, list) and all(isinstance(call, Mapping) for call in value):
        return value
    raise DataError(f"{where} is {described(value)}; it must be a list of objects")


def _content(name: str, value: object) -> str | None:
    """Return the text of a message, which may come in parts."""
    if value is None:
        return None
    if not isinstance(value, list):
        return _text(name, value)
    parts: list[str] = []
    for number, part in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else None
            found = f"of type {kind!r}" if kind else described(part)
            raise DataError(
                f"{where} is {found}; only text can be trained: {{'type': 'text', 'text': …}}"
            )
        parts.append(_text(f"{where}.text", part.get("text")))
    return "".join(parts)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {described(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half of a surrogate pair at character {error.start + 1}; write the whole "
            "character"
        ) from error
    return value
