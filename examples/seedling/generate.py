"""The pretraining text: an endless, seeded mixture of small documents.

Run as a script it prints a sample: `python generate.py --documents 20`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from random import Random

from skills import (
    WordBag,
    pick_skill,
    same_skill_list,
    same_word_list,
    skill_chat,
    skill_line,
)
from stories import any_word, bare_word, sentence, story
from talk import (
    arithmetic,
    arithmetic_chat,
    compare_chat,
    fact_chat,
    in_template,
    json_chat,
    tool_chat,
)

from manylora.quickstart.words import WORDS

# Weights of the kinds of chat and of the kinds of document, in the order of `documents`.
MIXTURES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "skills": (
        (0.40, 0.28, 0.08, 0.14, 0.07, 0.03),
        (0.33, 0.16, 0.12, 0.12, 0.13, 0.07, 0.035, 0.035),
    ),
    "sums": (
        (0.22, 0.48, 0.07, 0.13, 0.07, 0.03),
        (0.29, 0.13, 0.10, 0.16, 0.12, 0.14, 0.03, 0.03),
    ),
}


def documents(seed: int, mixture: str = "skills") -> Iterator[str]:
    """Documents without their end-of-text token, the same ones for the same seed."""
    chat_weights, weights = MIXTURES[mixture]
    rng = Random(seed)
    bag = WordBag(rng)

    def chat() -> str:
        makers: list[Callable[[], tuple[str, str]]] = [
            lambda: skill_chat(rng, bag),
            lambda: arithmetic_chat(rng),
            lambda: compare_chat(rng),
            lambda: fact_chat(rng),
            lambda: json_chat(rng),
            lambda: tool_chat(rng),
        ]
        count = rng.choice((1, 1, 2, 3))
        return in_template(rng, [make() for make in rng.choices(makers, chat_weights, k=count)])

    kinds: list[Callable[[], str]] = [
        lambda: skill_line(rng, bag),
        lambda: same_skill_list(rng, bag),
        lambda: same_word_list(rng, bag),
        chat,
        lambda: bare_word(rng, any_word(rng)),
        lambda: arithmetic(rng),
        lambda: " ".join(sentence(rng) for _ in range(rng.randint(1, 4))),
        lambda: story(rng),
    ]
    while True:
        yield rng.choices(kinds, weights)[0]()


def tokenizer_text(seed: int, count: int = 20_000) -> Iterator[str]:
    """Text for the tokenizer: plain English and spelled words, no scrambled letters.

    Scrambled words are left out so that merges go to real words: a listed word becomes one
    token (with and without a space before it) and its scrambled form stays in small pieces.
    """
    rng = Random(seed)
    for i in range(count):
        if i % 2000 == 0:
            for _ in range(4):
                yield from (f"{word}\n{word} {word} {word}" for word in WORDS)
            yield from ("-".join(word) for word in WORDS)
        yield rng.choice((sentence, story))(rng)
        ask, reply = rng.choice((fact_chat, arithmetic_chat, compare_chat, json_chat))(rng)
        yield in_template(rng, [(ask, reply)])
        yield f"{ask} {reply}"
        name, _, _, asks = pick_skill(rng)
        yield f"{name}: {rng.choice(asks)} -> {name}\n{name} {name}"
        yield bare_word(rng, any_word(rng))


def main() -> None:
    """Print a sample of the mixture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixture", choices=MIXTURES, default="skills")
    args = parser.parse_args()
    stream = documents(args.seed, args.mixture)
    for _ in range(args.documents):
        print(next(stream), end="\n---\n")


if __name__ == "__main__":
    main()
