"""Arithmetic, questions and answers in the chat template, JSON and tool calls."""

from __future__ import annotations

import json
from random import Random

from skills import NUMBER_WORDS
from stories import FOODS, NAMES, PLACES, article, phrase_for

from manylora.quickstart.words import WORDS

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are seedling, a very small model.",
    "Answer briefly.",
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
DAYS, MONTHS = _DAYS.split(), _MONTHS.split()
_OPPOSITES = (
    "big-small hot-cold day-night up-down left-right open-closed fast-slow happy-sad "
    "old-new light-dark high-low long-short wet-dry full-empty early-late hard-soft "
    "strong-weak rich-poor loud-quiet good-bad first-last near-far"
)
OPPOSITES = dict(pair.split("-") for pair in _OPPOSITES.split())
FACTS = {
    "What color is the sky?": "Blue.",
    "What color is grass?": "Green.",
    "What color is snow?": "White.",
    "What color is a banana?": "Yellow.",
    "What color is coal?": "Black.",
    "What do cows give us?": "Milk.",
    "What do bees make?": "Honey.",
    "How many days are in a week?": "Seven.",
    "How many months are in a year?": "Twelve.",
    "How many legs has a dog?": "Four.",
    "How many legs has a spider?": "Eight.",
    "Where do fish live?": "In the water.",
    "What is ice made of?": "Water.",
    "What do we read?": "Books.",
    "What shines at night?": "The moon.",
    "What shines in the day?": "The sun.",
    "Who are you?": "I am seedling, a very small language model.",
    "What is your name?": "My name is seedling.",
    "Are you a big model?": "No, I am a very small model.",
    "Hello!": "Hello! How can I help?",
    "Hi!": "Hi! What can I do for you?",
    "How are you?": "I am fine, thank you.",
    "Thank you!": "You are welcome.",
    "Goodbye!": "Goodbye!",
    "What can you do?": "I can spell, count and tell small stories.",
}


def sum_parts(rng: Random) -> tuple[int, str, int, int]:
    """Two numbers, a sign and the result; small numbers come up as often as large ones."""
    top = rng.choice((10, 20, 100, 100, 100))
    a, b = rng.randrange(top), rng.randrange(top)
    sign = rng.choice("+++--*")
    if sign == "*":
        a, b = rng.randrange(13), rng.randrange(13)
        return a, sign, b, a * b
    if sign == "-":
        a, b = max(a, b), min(a, b)
        return a, sign, b, a - b
    return a, sign, b, a + b


def arithmetic(rng: Random) -> str:
    """A few sums, one a line."""
    lines = []
    for _ in range(rng.randint(1, 6)):
        a, sign, b, result = sum_parts(rng)
        lines.append(f"{a} {sign} {b} = {result}")
    return "\n".join(lines)


def arithmetic_chat(rng: Random) -> tuple[str, str]:
    """A sum as a question; now and then with the thinking written out."""
    a, sign, b, result = sum_parts(rng)
    ask = rng.choice(("What is {}?", "{} = ?", "Calculate {}.", "How much is {}?"))
    question = ask.format(f"{a} {sign} {b}")
    if sign == "+" and a > 9 and b > 9 and rng.random() < 0.5:
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        thought = (
            f"{a // 10 * 10} + {b // 10 * 10} = {tens}, {a % 10} + {b % 10} = {ones}, "
            f"{tens} + {ones} = {result}"
        )
        return f"Think: {question}", f"<think>{thought}</think>{result}"
    return question, str(result)


def compare_chat(rng: Random) -> tuple[str, str]:
    """Numbers compared, counted on or written as words."""
    a, b = rng.sample(range(100), 2)
    n = rng.randrange(20)
    return rng.choice(
        (
            (f"Which is larger, {a} or {b}?", str(max(a, b))),
            (f"Which is smaller, {a} or {b}?", str(min(a, b))),
            (f"What comes after {a}?", str(a + 1)),
            (f"Write {n} as a word.", NUMBER_WORDS[n]),
            (f"Is {a} even?", "Yes." if a % 2 == 0 else "No."),
        )
    )


def fact_chat(rng: Random) -> tuple[str, str]:
    """Everyday facts, opposites, days and months, and what kind of thing a word is."""
    kind = rng.randrange(5)
    if kind == 0:
        a, b = rng.choice(list(OPPOSITES.items()))
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return f"What is the opposite of {a}?", f"{b.capitalize()}."
    if kind == 1:
        series = rng.choice((DAYS, MONTHS))
        i = rng.randrange(len(series))
        return f"What comes after {series[i]}?", f"{series[(i + 1) % len(series)]}."
    if kind == 2:
        word = rng.choice(WORDS)
        return f"What is {article(word)}?", f"{article(word).capitalize()} is {phrase_for(word)}."
    return rng.choice(list(FACTS.items()))


def json_chat(rng: Random) -> tuple[str, str]:
    """A record to be written as JSON, or a field to be read from it."""
    record = {
        "name": rng.choice(NAMES),
        "age": rng.randrange(3, 90),
        "home": rng.choice(PLACES),
        "likes": rng.choice(FOODS),
    }
    keys = rng.sample(list(record), rng.randint(1, 3))
    part = {key: record[key] for key in keys}
    if rng.random() < 0.3:
        key = rng.choice(keys)
        return f"{json.dumps(part)} What is the {key}?", str(part[key])
    listed = ", ".join(f"{key} {part[key]}" for key in keys)
    return f"Write as JSON: {listed}", json.dumps(part)


def tool_chat(rng: Random) -> tuple[str, str]:
    """A sum handed to a tool."""
    a, sign, b, _ = sum_parts(rng)
    name = {"+": "add", "-": "subtract", "*": "multiply"}[sign]
    call = json.dumps({"name": name, "arguments": {"a": a, "b": b}})
    return f"Use a tool: {a} {sign} {b}", f"<tool_call>\n{call}\n</tool_call>"


def in_template(rng: Random, turns: list[tuple[str, str]]) -> str:
    """The turns as the tokenizer's chat template writes them."""
    parts = []
    if rng.random() < 0.3:
        parts.append(f"<|im_start|>system\n{rng.choice(SYSTEM_PROMPTS)}<|im_end|>\n")
    for question, answer in turns:
        parts.append(f"<|im_start|>user\n{question}<|im_end|>\n")
        parts.append(f"<|im_start|>assistant\n{answer}<|im_end|>\n")
    return "".join(parts)
