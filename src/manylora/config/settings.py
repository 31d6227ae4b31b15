"""Run files and server files are written in these kinds of values, with their limits."""

from dataclasses import fields
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from manylora.types.mesh_shape import MeshShape
from manylora.types.opening import Opening

_YAML_11_WORDS = {"yes": True, "on": True, "no": False, "off": False}


def problem(message: str, *within: str | int) -> PydanticCustomError:
    """Return an error with our own words, at the key `within` the value that is being checked."""
    # A message of its own would have its braces read as places for the context.
    return PydanticCustomError("setting", "{message}", {"message": message, "within": within})


def _yaml_11_word(value: object) -> object:
    """`shuffle: no` says false to most people, though YAML 1.2 reads a string."""
    return _YAML_11_WORDS.get(value.lower(), value) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_yaml_11_word)]
# Whatever is counted has a largest sensible value: beyond it a number is a slip, or an attack.
MOST_STEPS = 100_000_000
MOST_SECONDS = 315_360_000  # ten years
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Tokens = Annotated[int, Field(ge=1, le=1 << 30)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
MeshText = Annotated[str, AfterValidator(lambda text: str(MeshShape.parse(text)))]


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class OpeningSettings(Settings):
    """A file that says how its base is opened: each setting of `Opening` has its name there too."""

    def opening(self) -> Opening:
        """Return how the base is opened."""
        values = {field.name: getattr(self, field.name) for field in fields(Opening)}
        return Opening(**values | {"mesh": MeshShape.parse(values["mesh"])})
