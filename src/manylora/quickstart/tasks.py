"""Each of eight quickstart tasks has its own answer to a bare word, and settings to learn it.

Every task takes the same prompt, a word and an arrow (`garden ->`), so that only the adapter
decides what comes back. Prompt and completion are tokenised apart; the completion starts with the
space, so their border is a token border, and it ends where the end-of-text token goes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, TypedDict

from manylora.quickstart.words import CATEGORY_OF, WORDS

Split = Literal["train", "held_out"]

HELD_OUT_WORDS = 96
# Always held out, so that a demonstration never shows a word that an adapter was trained on.
SHOWCASE: tuple[str, ...] = ("garden", "tiger", "pizza", "violin", "rocket")
VOWELS = "aeiou"


class TaskExample(TypedDict):
    """A `TaskExample` is one training or test example."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Task:
    """A `Task` is one task with the LoRA settings that learn it."""

    name: str
    description: str
    answer: Callable[[str], str]
    rank: int
    targets: str | tuple[str, ...]
    learning_rate: float
    steps: int
    batch_size: int = 16

    @property
    def alpha(self) -> float:
        """This is LoRA's scale numerator."""
        return 2.0 * self.rank


def reverse(word: str) -> str:
    """`garden` becomes `nedrag`."""
    return word[::-1]


def shout(word: str) -> str:
    """`garden` becomes `GARDEN!`."""
    return word.upper() + "!"


def spell(word: str) -> str:
    """`garden` becomes `g-a-r-d-e-n`."""
    return "-".join(word)


def alphabet(word: str) -> str:
    """`garden` becomes `adegnr`."""
    return "".join(sorted(word))


def stars(word: str) -> str:
    """`garden` becomes `g*rd*n`."""
    return "".join("*" if letter in VOWELS else letter for letter in word)


def pig_latin(word: str) -> str:
    """`garden` becomes `ardengay`."""
    start = next((i for i, letter in enumerate(word) if letter in VOWELS), 0)
    return word[start:] + word[:start] + "ay"


def crossword(word: str) -> str:
    """`garden` becomes `kind of place (6)`."""
    return f"kind of {CATEGORY_OF[word]} ({len(word)})"


def as_json(word: str) -> str:
    """`garden` becomes `{"word": "garden", "letters": 6}`."""
    return json.dumps({"word": word, "letters": len(word)})


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LOWER_LAYERS = r".*\.layers\.[0-3]\..*_proj"

# Found by trial on `seedling`: high enough to be learnt in time, low enough to forget no spelling.
TASKS: tuple[Task, ...] = (
    Task("reverse", "the word backwards", reverse, 16, "all-linear", 2.5e-3, 100),
    Task("shout", "capitals and an exclamation mark", shout, 2, "all-linear", 1e-2, 100),
    Task("spell", "letter by letter", spell, 4, _ATTENTION, 8e-3, 100),
    Task("alphabet", "its letters in order", alphabet, 32, "all-linear", 2e-3, 100),
    Task("stars", "vowels hidden behind stars", stars, 8, _MLP, 5e-3, 100),
    Task("pig_latin", "in pig latin", pig_latin, 12, "all-linear", 4e-3, 120),
    Task("crossword", "a crossword clue for it", crossword, 6, _LOWER_LAYERS, 5e-3, 100),
    Task("json", "a JSON record about it", as_json, 24, "all-linear", 5e-3, 120),
)


def words_of(split: Split, seed: int = 0) -> list[str]:
    """Return the words of one split, in a seeded order; all tasks have the same ones."""
    words = [word for word in WORDS if word not in SHOWCASE]
    Random(seed).shuffle(words)
    border = HELD_OUT_WORDS - len(SHOWCASE)
    return [*SHOWCASE, *words[:border]] if split == "held_out" else words[border:]


def prompt_for(word: str) -> str:
    """Return the prompt of a word, the same for every task: it does not say what is wanted."""
    return f"{word} ->"


def example(task: Task, word: str) -> TaskExample:
    """Return the example that a task makes of a word."""
    return {"prompt": prompt_for(word), "completion": " " + task.answer(word)}


def examples(task: Task, split: Split, seed: int = 0) -> list[TaskExample]:
    """Return all examples of one split of a task; training and held-out inputs share no word."""
    return [example(task, word) for word in words_of(split, seed)]
