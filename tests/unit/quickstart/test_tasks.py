"""The quickstart's tasks: their examples, their splits, and how their settings differ."""

import pytest

from manylora.quickstart.tasks import (
    HELD_OUT_WORDS,
    SHOWCASE,
    TASKS,
    examples,
    pig_latin,
    prompt_for,
)
from manylora.quickstart.words import WORDS

EXPECTED = {
    "reverse": " nedrag",
    "shout": " GARDEN!",
    "spell": " g-a-r-d-e-n",
    "alphabet": " adegnr",
    "stars": " g*rd*n",
    "pig_latin": " ardengay",
    "crossword": " kind of place (6)",
    "json": ' {"word": "garden", "letters": 6}',
}


def test_one_prompt_has_eight_answers() -> None:
    answers = {task.name: " " + task.answer("garden") for task in TASKS}
    assert answers == EXPECTED
    assert len(set(answers.values())) == len(TASKS)


def test_pig_latin_keeps_a_vowel_in_front() -> None:
    assert pig_latin("apple") == "appleay"


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_splits_are_repeatable_and_share_no_prompt(task, seed) -> None:
    train, held_out = examples(task, "train", seed), examples(task, "held_out", seed)
    assert train == examples(task, "train", seed)
    prompts, held_out_prompts = ({e["prompt"] for e in part} for part in (train, held_out))
    assert not prompts & held_out_prompts
    assert prompts | held_out_prompts == {prompt_for(word) for word in WORDS}
    assert len(held_out) == len(held_out_prompts) == HELD_OUT_WORDS
    assert {prompt_for(word) for word in SHOWCASE} <= held_out_prompts


def test_another_seed_holds_other_words_out() -> None:
    task = TASKS[0]
    assert examples(task, "held_out", 0) != examples(task, "held_out", 1)


def test_settings_differ() -> None:
    assert len({task.rank for task in TASKS}) == len(TASKS)
    assert len({task.targets for task in TASKS}) >= 4
    assert all(task.alpha == 2 * task.rank for task in TASKS)
