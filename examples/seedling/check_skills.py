"""Measures what the base itself can do: the string skills when asked by name, sums, and facts.

Prints a Markdown table of exact greedy answers. Questions are drawn with a seed of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from skills import SKILLS, made_up_word
from talk import compare_chat, fact_chat, json_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.quickstart.words import WORDS
from manylora.runs.board import percent

SHIPPED = Path(__file__).parents[2] / "src" / "manylora" / "models" / "seedling"
Pair = tuple[str, str]


class Asker:
    """Asks the base and counts exact answers."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def share(self, pairs: list[Pair]) -> float:
        """Share of prompts whose text up to a special token or a new line is the answer."""
        encoded = self._tokenizer([p for p, _ in pairs], return_tensors="pt", padding=True)
        width = encoded["input_ids"].shape[1]
        with torch.no_grad():
            out = self._model.generate(**encoded, max_new_tokens=40)
        texts = self._tokenizer.batch_decode(out[:, width:])
        right = sum(
            text.split("<|")[0].split("\n")[0] == answer
            for text, (_, answer) in zip(texts, pairs, strict=True)
        )
        return right / len(pairs)


def in_chat(pair: Pair) -> Pair:
    """A question as the chat template hands it to the model."""
    question, answer = pair
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", answer


def sums(rng: Random, sign: str, top: int, count: int) -> list[Pair]:
    """Sums in the chat template, with numbers below `top`."""
    work = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}[sign]
    pairs = []
    for _ in range(count):
        a, b = sorted((rng.randrange(top), rng.randrange(top)), reverse=True)
        pairs.append(in_chat((f"What is {a} {sign} {b}?", str(work(a, b)))))
    return pairs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--count", type=int, default=200, help="questions of a kind")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    asker, rng = Asker(args.model), Random(11)
    print("| asked | right |\n|---|---|")
    for name, _, answer, asks in SKILLS:
        words = rng.sample(WORDS, min(args.count, len(WORDS)))
        lines = asker.share([(f"{name}: {w} ->", " " + answer(w)) for w in words])
        chats = asker.share([in_chat((rng.choice(asks).format(w=w), answer(w))) for w in words])
        print(
            f"| {name}, of a listed word (one line / chat) | {percent(lines)} / {percent(chats)} |"
        )
    made_up = [made_up_word(rng) for _ in range(args.count)]
    share = asker.share([(f"reverse: {w} ->", " " + w[::-1]) for w in made_up])
    print(f"| reverse, of a made-up word | {percent(share)} |")
    for sign, top in (("+", 10), ("+", 100), ("-", 10), ("-", 100), ("*", 10)):
        share = asker.share(sums(rng, sign, top, args.count))
        print(f"| a {sign} b below {top}, chat | {percent(share)} |")
    makers: dict[str, Callable[[Random], Pair]] = {
        "facts": fact_chat,
        "numbers compared and counted": compare_chat,
        "JSON": json_chat,
    }
    for name, make in makers.items():
        share = asker.share([in_chat(make(rng)) for _ in range(args.count)])
        print(f"| {name}, chat | {percent(share)} |")


if __name__ == "__main__":
    main()
