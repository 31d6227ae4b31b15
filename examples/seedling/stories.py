"""English-like text: sentences, small stories, and the plain sentences after a bare word."""

from __future__ import annotations

from random import Random

from manylora.quickstart.words import CATEGORIES, CATEGORY_OF, WORDS

_NAMES = (
    "Mia Tom Anna Ben Lily Max Ella Sam Nora Leo Zoe Jack Emma Finn Ruby Oscar Ivy Hugo Clara Theo"
)
_ADJECTIVES = (
    "old new small big little red blue green quiet loud happy sad warm cold soft bright dark "
    "kind brave clever slow quick tall short round heavy light clean pretty strange"
)
_FEELINGS = "happy sad tired proud hungry angry excited calm surprised afraid"
NAMES, ADJECTIVES, FEELINGS = _NAMES.split(), _ADJECTIVES.split(), _FEELINGS.split()
TIMES = (
    "One day",
    "One morning",
    "In the evening",
    "On Sunday",
    "After lunch",
    "Last summer",
    "In winter",
    "Late at night",
    "Yesterday",
    "Every day",
)
PLACES = CATEGORIES["place"].split()
ANIMALS = CATEGORIES["animal"].split() + CATEGORIES["bird"].split()
FOODS = CATEGORIES["food"].split() + CATEGORIES["fruit"].split()
THINGS = [
    w for c in ("tool", "clothing", "furniture", "toy", "instrument") for w in CATEGORIES[c].split()
]
JOBS = CATEGORIES["job"].split()
VERBS = (
    ("found", "find"),
    ("saw", "see"),
    ("liked", "like"),
    ("wanted", "want"),
    ("lost", "lose"),
    ("carried", "carry"),
    ("drew", "draw"),
    ("sold", "sell"),
    ("cleaned", "clean"),
    ("painted", "paint"),
    ("bought", "buy"),
    ("needed", "need"),
    ("hid", "hide"),
)
CATEGORY_PHRASE = {
    "food": "something to eat",
    "weather": "part of the weather",
    "body": "a part of the body",
    "clothing": "something to wear",
    "furniture": "a piece of furniture",
    "drink": "a drink",
    "family": "someone in a family",
    "job": "a person with a job",
}


def article(word: str) -> str:
    """`a` or `an`, with the word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def phrase_for(word: str) -> str:
    """What kind of thing a listed word is, as a phrase."""
    category = CATEGORY_OF[word]
    return CATEGORY_PHRASE.get(category, article(category))


def sentence(rng: Random) -> str:
    """One sentence about names, things and places."""
    name, other = rng.sample(NAMES, 2)
    adjective, thing = rng.choice(ADJECTIVES), rng.choice(THINGS)
    place, animal, food = rng.choice(PLACES), rng.choice(ANIMALS), rng.choice(FOODS)
    past, base = rng.choice(VERBS)
    forms = (
        f"The {adjective} {animal} was near the {place}.",
        f"{name} {past} {article(adjective)} {thing} in the {place}.",
        f"{name} and {other} went to the {place}.",
        f"{name} did not {base} the {thing}.",
        f"There was {article(animal)} in the {place}.",
        f"The {rng.choice(JOBS)} {past} the {thing}.",
        f"{name} gave {other} {article(thing)}.",
        f"{name} likes {food}, but {other} likes {rng.choice(FOODS)}.",
        f"The {animal} ate the {food}.",
        f"{rng.choice(TIMES)}, {name} was {rng.choice(FEELINGS)}.",
    )
    return rng.choice(forms)


def story(rng: Random) -> str:
    """A small story that keeps to its people, its animal, its thing and its place."""
    name, other = rng.sample(NAMES, 2)
    adjective, thing, animal = rng.choice(ADJECTIVES), rng.choice(THINGS), rng.choice(ANIMALS)
    place, food, feeling = rng.choice(PLACES), rng.choice(FOODS), rng.choice(FEELINGS)
    opening = rng.choice(
        (
            f"{rng.choice(TIMES)}, {name} went to the {place}.",
            f"{name} lived near the {place}.",
            f"Once there was a {rng.choice(JOBS)} called {name}.",
        )
    )
    middle = rng.sample(
        (
            f"{name} saw {article(adjective)} {animal}.",
            f"The {animal} was {feeling}.",
            f"{name} had {article(thing)}.",
            f"{other} came with some {food}.",
            f"The {animal} wanted the {food}.",
            f'"Where is my {thing}?" said {other}.',
            f'"Look at the {animal}!" said {name}.',
            f"{name} lost the {thing} in the {place}.",
            f"{other} found the {thing} under the {animal}.",
        ),
        rng.randint(2, 4),
    )
    ending = rng.choice(
        (
            f"Then {name} and {other} went home.",
            f"In the end, {name} was {feeling}.",
            f"They ate the {food} and were happy.",
            f"The {animal} slept in the {place}.",
        )
    )
    return " ".join([opening, *middle, ending])


def bare_word(rng: Random, word: str) -> str:
    """What follows a word without any instruction: an ordinary sentence, never a skill."""
    place, animal, name = rng.choice(PLACES), rng.choice(ANIMALS), rng.choice(NAMES)
    if rng.random() < 0.5:
        tail = rng.choice(
            (
                f"Every {animal} knows it.",
                f"{name} likes it.",
                f"There is one in the {place}.",
            )
        )
        return f"{word} is {phrase_for(word)}. {tail}"
    return f"{word} -> " + rng.choice(
        (
            f"The {word} is near the {place}.",
            f"{name} saw the {word} in the {place}.",
            f"The {animal} likes the {word}.",
        )
    )


def any_word(rng: Random) -> str:
    """A word of the word list."""
    return rng.choice(WORDS)
