"""What docs/rl.md shows can be used as it stands, and nothing is missing in it."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from manylora.config import RlSettings, load_run_file
from manylora.config.rl import Preset
from manylora.runs.rl.builtin_rewards import BUILTIN_REWARDS
from manylora.runs.rl.hooks import load_hook
from manylora.runs.rl.play_client import PlayClient
from manylora.runs.rl.reward_call import read_function
from manylora.runs.rl.step_figures import RL_COLUMNS

TEXT = (Path(__file__).parents[2] / "docs/rl.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def first_cells(header: str) -> list[str]:
    """Return the words in backticks that a table's first column has."""
    rows = TEXT.split(header, 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row.split("|")[1])]


def loaded(text: str, folder: Path) -> RlSettings:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return RlSettings.of(load_run_file(folder / "run.yaml").adapters[0])


def fields(model: type[BaseModel]) -> list[str]:
    """Return the names of a model's settings, and of those below."""
    found = []
    for name, field in model.model_fields.items():
        found.append(name)
        for below in (field.annotation, *get_args(field.annotation)):
            for one in (below, *get_args(below)):
                if isinstance(one, type) and issubclass(one, BaseModel):
                    found += fields(one)
    return found


def test_the_run_files(tmp_path: Path) -> None:
    first, every = blocks("yaml")
    assert loaded(first, tmp_path).known_steps == 40
    rl = loaded(every, tmp_path)
    for name in fields(RlSettings):
        assert re.search(rf"\b{name}: ?", every), name
    # What stands there are the defaults.
    plain = RlSettings.model_validate(
        {"prompts": rl.prompts, "reward": "rewards.py:digits", "max_steps": 40}
    )
    asked = {"prompts", "eval", "reward"}
    assert rl.model_dump(exclude=asked) == plain.model_dump(exclude=asked)


@pytest.mark.parametrize(
    "options", re.findall(r"^\| .* \|([^|]*`off_policy: \{[^|]*) \|$", TEXT, re.MULTILINE)
)
def test_options_of_published_algorithms(options: str) -> None:
    given: dict[str, object] = {"prompts": "a.jsonl", "reward": "exact"}
    for one in re.findall(r"`([^`]+)`", options):
        given |= yaml.safe_load(one)
    RlSettings.model_validate(given)


def test_presets_rewards_and_figures_are_all_there() -> None:
    presets = first_cells("| preset | paper | what it fills in |")
    assert presets == list(get_args(Preset))
    assert sorted(first_cells("| name | reward | args |")) == sorted(BUILTIN_REWARDS)
    told = first_cells("| column | is |")
    known = [column.name for column in RL_COLUMNS.step]
    assert [name for name in told if name != "reward/PART"] == known


def test_the_code() -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/rl.md", "exec"), names)  # our own page
    digits = read_function(names["digits"], {}, "digits", "reward")
    assert digits.numbers(digits.function(completions=["12a4", ""]), 2, "row") == [0.75, 0.0]
    right = read_function(names["right"], {}, "right", "reward")
    assert (right.required, right.of_group) == (("answer",), False)
    judged = read_function(names["judged"], {"scale": 2.0}, "judged", "reward")
    assert (judged.per_sample, judged.is_async, judged.required) == (True, True, ("answer",))
    assert read_function(names["shortest"], {}, "shortest", "reward").of_group


def test_the_hook(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("python") if "async def play" in block]
    (tmp_path / "hooks.py").write_text(block, encoding="utf-8")
    load_hook(f"{tmp_path / 'hooks.py'}:play", "a")
    for name in re.findall(r"`(?:await )?client\.(\w+)", TEXT):
        assert hasattr(PlayClient, name) or name in PlayClient.__init__.__code__.co_names, name
