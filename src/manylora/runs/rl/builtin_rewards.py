"""Rewards that need no code of one's own; `args` of the run file set them.

Each of them scores one sample by its text. A column that holds what is right is named by `column`,
`answer` unless the run file says otherwise.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal, Self

import regex
from pydantic import Field, ValidationError, model_validator

from manylora.config.settings import Flag, Positive, Settings, Text, problem
from manylora.runs.rl.reward_call import RewardFunction
from manylora.runs.rl.user_code import did_you_mean
from manylora.types import ConfigError, RewardError

# Seconds of one match of a pattern, which takes microseconds.
_ONE_MATCH = 1.0

# Takes the sample's text, its number of tokens, and the column that is asked for.
Score = Callable[[str, int, Any], float | None]


class _Builtin(Settings, ABC):
    """A `_Builtin` reward has its settings as fields, and makes of them how it scores."""

    def wanted(self) -> str | None:
        """Return the column that it asks for, if any."""
        return None

    @abstractmethod
    def score(self) -> Score:
        """Return how it scores. Raises ConfigError where a package is missing."""


class _Compared(_Builtin):
    """A `_Compared` reward looks at a column."""

    column: Text = "answer"
    """The column that holds what is right."""

    def wanted(self) -> str | None:
        return self.column


class ExactReward(_Compared):
    """1 if the answer is the column's text, else 0."""

    strip: Flag = True
    """Blanks at either end do not count."""
    ignore_case: Flag = False
    """Nor does case."""

    def score(self) -> Score:
        def same(text: str) -> str:
            text = text.strip() if self.strip else text
            return text.casefold() if self.ignore_case else text

        return lambda text, _, right: float(same(text) == same(_text(right, self.column)))


class ContainsReward(_Builtin):
    """1 if the answer contains a text, or each of several, or the column's; else 0."""

    text: Text | list[Text] | None = None
    """What must be in it."""
    column: Text | None = None
    """In place of `text`: the column that holds it."""
    ignore_case: Flag = False
    """Case does not count."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.text is None) == (self.column is None):
            raise problem("give either text or column", "text")
        return self

    def wanted(self) -> str | None:
        return self.column

    def score(self) -> Score:
        def fold(text: str) -> str:
            return text.casefold() if self.ignore_case else text

        def found(text: str, _: int, value: Any) -> float:
            given = value if self.text is None else self.text
            parts = given if isinstance(given, list) else [given]
            return float(all(fold(_text(p, self.column or "")) in fold(text) for p in parts))

        return found


class RegexReward(_Builtin):
    """1 if a pattern is found in the answer, else 0."""

    pattern: Text
    """As Python's `re` has them."""
    full: Flag = False
    """It must match the whole answer."""
    column: Text | None = None
    """What its first group must have matched is in this column."""

    def wanted(self) -> str | None:
        return self.column

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            found = regex.compile(self.pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise problem(f"is no regular expression: {error}", "pattern") from error
        if self.column is not None and not found.groups:
            raise problem("has no group (…) to be compared with the column", "pattern")
        return self

    def score(self) -> Score:
        pattern = regex.compile(self.pattern)
        look = pattern.fullmatch if self.full else pattern.search

        def matches(text: str, _: int, right: Any) -> float:
            try:
                # Meanwhile other threads go on.
                match = look(text, timeout=_ONE_MATCH, concurrent=True)
            except TimeoutError:
                raise RewardError(
                    f"the pattern {self.pattern!r} took longer than {_ONE_MATCH:g} s to match; "
                    "write it simpler"
                ) from None
            if match is None or self.column is None:
                return float(match is not None)
            return float((match[1] or "").strip() == _text(right, self.column).strip())

        return matches


class LengthReward(_Builtin):
    """0 for an answer of the wanted length, down by 1 for each `scale` that it is off."""

    target: Annotated[int, Field(ge=0)]
    """The wanted length."""
    unit: Literal["characters", "words", "tokens"] = "characters"
    """What is counted; the token that ends an answer is one of them."""
    scale: Positive | None = None
    """null = the wanted length."""

    def score(self) -> Score:
        scale = float(self.scale or max(1, self.target))

        def off(text: str, tokens: int, _: Any) -> float:
            sizes = {"characters": len(text), "tokens": tokens}
            size = sizes[self.unit] if self.unit in sizes else len(text.split())
            return -abs(size - self.target) / scale

        return off


class JsonSchemaReward(_Builtin):
    """1 if the answer is JSON that a schema allows, else 0."""

    json_schema: dict[str, Any] = Field(alias="schema")
    """See https://json-schema.org."""

    def score(self) -> Score:
        validators = _package("jsonschema", "json_schema", "pip install jsonschema")
        kind = validators.validators.validator_for(self.json_schema)
        try:
            kind.check_schema(self.json_schema)
        except validators.SchemaError as error:
            raise ConfigError(f"schema is no JSON schema: {error.message}") from error
        validator = kind(self.json_schema)

        def valid(text: str, _: int, __: Any) -> float:
            try:
                return float(validator.is_valid(json.loads(text)))
            except (ValueError, RecursionError):
                return 0.0

        return valid


class MathVerifyReward(_Compared):
    """1 if the answer's last expression equals the column's, else 0; None where the column holds no
    mathematics."""

    def score(self) -> Score:
        library = _package("math_verify", "math_verify", "pip install 'manylora[math]'")

        def equal(text: str, _: int, right: Any) -> float | None:
            # Its own limits are signals, which only the main thread has; ours stands around it.
            gold = library.parse(_text(right, self.column), parsing_timeout=None)
            if not gold:
                return None
            answer = library.parse(text, parsing_timeout=None)
            return float(library.verify(gold, answer, timeout_seconds=None))

        return equal


BUILTIN_REWARDS: Mapping[str, type[_Builtin]] = {
    "contains": ContainsReward,
    "exact": ExactReward,
    "json_schema": JsonSchemaReward,
    "length": LengthReward,
    "math_verify": MathVerifyReward,
    "regex": RegexReward,
}


def open_builtin(name: str, args: Mapping[str, Any], key: str) -> RewardFunction:
    """Return a built-in reward, set as the run file says.

    Raises:
        ConfigError: a setting is unknown or wrong, or a package is missing.
    """
    model = BUILTIN_REWARDS[name]
    try:
        settings = model.model_validate(dict(args))
        score, column = settings.score(), settings.wanted()
    except ValidationError as error:
        raise ConfigError(_complaint(name, model, key, error)) from error
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error

    def scored(completion: Any, completion_ids: Sequence[int], **columns: Any) -> float | None:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        return score(text, len(completion_ids), columns.get(column) if column else None)

    return RewardFunction(
        function=scored,
        shown=name,
        per_sample=True,
        of_group=False,
        is_async=False,
        given=frozenset({"completion", "completion_ids"}),
        required=(column,) if column else (),
        optional=(),
        takes_all=False,
        args={},
    )


def _complaint(name: str, model: type[_Builtin], key: str, error: ValidationError) -> str:
    known = [field.alias or own for own, field in model.model_fields.items()]
    lines: list[str] = []
    for details in error.errors(include_url=False):
        context = details.get("ctx", {})
        path = (*details["loc"], *context.get("within", ()))
        setting = ".".join(map(str, path)) or "args"
        what = details["msg"]
        if details["type"] == "extra_forbidden":
            what = f"is not a setting of {name}; {did_you_mean(setting, known)}"
        elif details["type"] == "missing":
            what = f"is missing; {name} needs it"
        lines.append(f"{key}: args.{setting}: {what}")
    return "\n".join(lines)


def _text(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise RewardError(f"column {column!r} holds a {type(value).__name__}; it must be text")


def _package(module: str, reward: str, remedy: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the reward {reward} needs the package {module}; install it: {remedy}"
        ) from error
