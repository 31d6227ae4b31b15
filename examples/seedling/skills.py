"""String skills in explicit instruction form: the part of the text that adapters build on.

Every skill is asked for by name here, in several phrasings. What the quickstart's adapters
learn later is to apply one skill to a bare word, without any instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from manylora.quickstart.words import CATEGORY_OF, WORDS

VOWELS = "aeiou"
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
NUMBER_WORDS = _NUMBERS.split()


def rotate(word: str) -> str:
    """Move the consonants before the first vowel to the end of the word."""
    for i, letter in enumerate(word):
        if letter in VOWELS:
            return word[i:] + word[:i]
    return word


def stars(word: str) -> str:
    """Hide every vowel behind a star."""
    return "".join("*" if letter in VOWELS else letter for letter in word)


def vowels(word: str) -> str:
    """Keep the vowels only."""
    return "".join(letter for letter in word if letter in VOWELS) or "none"


Skill = tuple[str, float, Callable[[str], str], tuple[str, ...]]

# name, weight, function, ways to ask for it in a chat
SKILLS: tuple[Skill, ...] = (
    (
        "reverse",
        1.2,
        lambda w: w[::-1],
        ("Reverse {w}.", "Write {w} backwards.", "Can you reverse the word {w}?"),
    ),
    (
        "upper",
        0.7,
        str.upper,
        ("Write {w} in capital letters.", "Make {w} upper case.", "Say {w} in capitals, please."),
    ),
    ("spell", 0.8, "-".join, ("Spell {w}.", "How do you spell {w}?", "Please spell the word {w}.")),
    (
        "sort",
        1.2,
        lambda w: "".join(sorted(w)),
        (
            "Sort the letters of {w}.",
            "Put the letters of {w} in order.",
            "What are the sorted letters of {w}?",
        ),
    ),
    (
        "stars",
        1.0,
        stars,
        (
            "Hide the vowels of {w}.",
            "Put stars for the vowels in {w}.",
            "Write {w} with its vowels hidden.",
        ),
    ),
    (
        "rotate",
        1.0,
        rotate,
        ("Rotate {w}.", "Move the start of {w} to its end.", "What is {w} when it is rotated?"),
    ),
    ("vowels", 0.5, vowels, ("Which vowels are in {w}?", "Give me the vowels of {w}.")),
    (
        "length",
        0.6,
        lambda w: NUMBER_WORDS[len(w)],
        ("How many letters has {w}?", "Count the letters of {w}.", "How long is the word {w}?"),
    ),
    (
        "digits",
        0.4,
        lambda w: str(len(w)),
        ("Give the number of letters of {w} in digits.", "Length of {w} as a number?"),
    ),
    (
        "first",
        0.3,
        lambda w: w[0],
        ("What is the first letter of {w}?", "Which letter does {w} begin with?"),
    ),
    (
        "last",
        0.3,
        lambda w: w[-1],
        ("What is the last letter of {w}?", "Which letter does {w} end with?"),
    ),
    (
        "kind",
        0.6,
        lambda w: CATEGORY_OF.get(w, "word"),
        ("What kind of thing is {w}?", "What is the category of {w}?", "Sort of thing: {w}?"),
    ),
)
_WEIGHTS = [skill[1] for skill in SKILLS]
_SYLLABLE_TEXT = (
    "ba be bo da de di do fa fi ga go ha ka ke ko la le li lo ma me mi mo na ne no pa pe po ra re "
    "ri ro sa se si so ta te ti to va ve vi wa we za zo"
)
_SYLLABLES = _SYLLABLE_TEXT.split()
_ENDINGS = ("", "", "n", "r", "l", "s", "t", "m", "nd", "st", "rk")


class WordBag:
    """Deals the word list in shuffled rounds, so that every word comes up equally often."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._left: list[str] = []

    def draw(self) -> str:
        """The next word; one in twenty is made up, so that spelling is not all memory."""
        if self._rng.random() < 0.05:
            return made_up_word(self._rng)
        if not self._left:
            self._left = list(WORDS)
            self._rng.shuffle(self._left)
        return self._left.pop()


def made_up_word(rng: Random) -> str:
    """A pronounceable word of two or three syllables that is probably not English."""
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
    return word + rng.choice(_ENDINGS)


def pick_skill(rng: Random) -> Skill:
    """One skill, by weight."""
    return rng.choices(SKILLS, weights=_WEIGHTS)[0]


def skill_line(rng: Random, bag: WordBag) -> str:
    """One instruction on one line (or two) with its answer."""
    name, _, answer, _ = pick_skill(rng)
    word = bag.draw()
    forms = (
        f"{name} {word} -> {answer(word)}",
        f"{name}: {word} -> {answer(word)}",
        f"{name}\n{word} {answer(word)}",
        f"{name}\n{word} -> {answer(word)}",
        f"{word} {name} -> {answer(word)}",
    )
    return rng.choice(forms)


def same_skill_list(rng: Random, bag: WordBag) -> str:
    """A heading that names the skill, then a few words each with its answer."""
    name, _, answer, _ = pick_skill(rng)
    arrow = rng.choice(("", " ->"))
    words = [bag.draw() for _ in range(rng.randint(2, 5))]
    return "\n".join([name, *(f"{word}{arrow} {answer(word)}" for word in words)])


def same_word_list(rng: Random, bag: WordBag) -> str:
    """A word, then a few of the skills applied to it: ties one spelling to all its forms."""
    word = bag.draw()
    chosen = rng.sample(SKILLS, rng.randint(2, 5))
    lines = [f"{name} -> {answer(word)}" for name, _, answer, _ in chosen]
    return "\n".join([word + ":", *lines])


def skill_chat(rng: Random, bag: WordBag) -> tuple[str, str]:
    """A question and its bare answer, for the chat template."""
    _, _, answer, asks = pick_skill(rng)
    word = bag.draw()
    return rng.choice(asks).format(w=word), answer(word)
