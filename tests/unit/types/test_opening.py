"""What an opening says, and that it is said in one place."""

from dataclasses import fields

import pytest

import manylora
from manylora.types import ConfigError, Opening, OpeningOptions


def test_the_options_are_the_openings_own():
    names = {field.name for field in fields(Opening)}
    assert set(OpeningOptions.__annotations__) == names - {"base", "mesh"}


def test_a_setting_out_of_range_and_one_that_is_said_twice():
    with pytest.raises(ConfigError, match="token_budget is 0"):
        Opening("seedling", token_budget=0)
    for again in ({"threads": 1}, {"mesh": "dp=2"}):
        with pytest.raises(ConfigError, match="give them there"):
            manylora.Trainer(Opening("seedling"), **again)  # type: ignore[arg-type]
