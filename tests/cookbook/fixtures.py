"""A working directory in which the recipes find, offline, all that they would download.

Tokenizers and data sets are looked up by their hub names, which are tried as folders of the
current directory first. Everything is generated, the same every time, and short.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset

from manylora.models.base import resolve_base
from manylora.quickstart.words import CATEGORY_OF, WORDS
from tests.wire.server import BASE_ALIAS, CHAT_ALIAS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PROMPT_DATA = "prompt_distillation.jsonl"
CONTINUAL_DATA = "continual"
RUBRIC_DATA = "rubric.jsonl"

# A name that a recipe has in its code.
ANSWERER = "Qwen/Qwen3.5-9B"

# What preference.dpo holds out, and takes without looking whether there are as many.
PREFERENCE_TESTS = 1024

Ask = tuple[str, Callable[[str], str]]

# What `seedling` has learned to be asked, and what it then answers.
ASKS: tuple[Ask, ...] = (
    ("Reverse {}.", lambda word: word[::-1]),
    ("Write {} in capital letters.", str.upper),
    ("Spell {}.", "-".join),
    ("What kind of thing is {}?", CATEGORY_OF.__getitem__),
    ("What is the first letter of {}?", lambda word: word[0]),
)


def make_workplace(folder: Path) -> Path:
    """Write everything below `folder`."""
    tokenizer = Path(resolve_base("seedling"))
    for alias in (BASE_ALIAS, CHAT_ALIAS, ANSWERER):
        (folder / alias).mkdir(parents=True)
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, folder / alias / name)
    _dataset(folder / "HuggingFaceH4/no_robots", train=_chats(1, 256), test=_chats(2, 136))
    _dataset(folder / "openai/gsm8k", train=_sums(3, 256), test=_sums(4, 16))
    _named_config(folder / "openai/gsm8k", "main", ("train", "test"))
    _dataset(
        folder / "Anthropic/hh-rlhf",
        train=_preferences(5, 128),
        test=_preferences(6, PREFERENCE_TESTS),
    )
    _dataset(folder / "zwhe99/DeepMath-103K", train=_questions(7, 64))
    _dataset(folder / "tangqiaoyu/ToolAlpaca", train=_tools(8, 64))
    _write(folder / PROMPT_DATA, _chats(9, 64))
    _dataset(folder / "allenai/tulu-3-sft-mixture", train=_chats(10, 64))
    _dataset(folder / "open-thoughts/OpenThoughts3-1.2M", train=_thoughts(11, 64))
    _continual(folder / CONTINUAL_DATA)
    _write(folder / RUBRIC_DATA, _rubrics(14, 16))
    _dataset(folder / "Salesforce/wikitext", train=_prose(16, 200))
    _named_config(folder / "Salesforce/wikitext", "wikitext-103-raw-v1", ("train",))
    return folder


def _exchanges(seed: int, count: int) -> Iterator[tuple[str, str, str]]:
    """Questions, their answers, and answers that belong to another word."""
    rng = Random(seed)
    for _ in range(count):
        ask, answer = rng.choice(ASKS)
        word, other = rng.sample(WORDS, 2)
        yield ask.format(word), answer(word), answer(other)


def _chats(seed: int, count: int) -> Iterator[dict[str, Any]]:
    for number, (question, answer, _) in enumerate(_exchanges(seed, count)):
        yield {
            "prompt": question,
            "prompt_id": f"{seed}-{number}",
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "category": "Words",
        }


def _preferences(seed: int, count: int) -> Iterator[dict[str, str]]:
    for question, answer, wrong in _exchanges(seed, count):
        if answer == wrong:
            wrong += "?"  # a pair must differ in its last message
        start = f"\n\nHuman: {question}\n\nAssistant: "
        yield {"chosen": start + answer, "rejected": start + wrong}


def _sums(seed: int, count: int) -> Iterator[dict[str, str]]:
    rng = Random(seed)
    for _ in range(count):
        name, thing = rng.choice(("Mia", "Tom", "Anna")), rng.choice(WORDS)
        first, second = rng.randint(1, 9), rng.randint(1, 9)
        yield {
            "question": f"{name} has {first} {thing}s and finds {second} more. How many are there?",
            "answer": f"{first}+{second}={first + second}\n#### {first + second}",
        }


def _questions(seed: int, count: int) -> Iterator[dict[str, str]]:
    for question, answer, _ in _exchanges(seed, count):
        yield {"question": question, "final_answer": answer}


def _tools(seed: int, count: int) -> Iterator[dict[str, str]]:
    for question, answer, _ in _exchanges(seed, count):
        yield {"instruction": question, "output": answer}


def _thoughts(seed: int, count: int) -> Iterator[dict[str, Any]]:
    for question, answer, _ in _exchanges(seed, count):
        told = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        yield {"conversations": told}


def _prose(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Lines in which the words that rl_numerics_check counts are rare."""
    rng = Random(seed)
    for _ in range(count):
        yield {"text": " ".join(rng.choice((*WORDS, "after", "until")) for _ in range(20))}


def _rubrics(seed: int, count: int) -> Iterator[dict[str, Any]]:
    for question, answer, _ in _exchanges(seed, count):
        rubric = {
            "rubric_str": f"Is the answer {answer}?",
            "extraction_regex": "([01])",
            "grader_output_format_instruction": "Say 1 or 0.",
        }
        yield {"convo": [{"role": "user", "content": question}], "rubric_items": [rubric]}


def _continual(folder: Path) -> None:
    """Two tasks, one after the other, in the folders of the paper that sdft belongs to."""
    told = list(_exchanges(12, 32))
    _arrow(
        folder / "tooluse_data",
        train=[{"prompt": ask, "golden_response": [answer]} for ask, answer, _ in told],
        tested=[{"prompt": ask, "golden_answer": [{"Action": answer}]} for ask, answer, _ in told],
    )
    told = list(_exchanges(13, 32))
    system = {"role": "system", "content": "Answer."}
    asked = [(system, {"role": "user", "content": ask}) for ask, _, _ in told]
    _arrow(
        folder / "science_data",
        train=[
            {"messages": list(messages), "output_text": answer}
            for messages, (_, answer, _) in zip(asked, told, strict=True)
        ],
        tested=[{"prompt": list(messages), "answer": "A"} for messages in asked],
    )


def _arrow(folder: Path, train: list[dict[str, Any]], tested: list[dict[str, Any]]) -> None:
    for name, rows in (("train_data", train), ("eval_data", tested)):
        Dataset.from_list(rows).save_to_disk(str(folder / name))


def _dataset(folder: Path, **splits: Iterable[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        _write(folder / f"{name}.jsonl", rows)


def _named_config(folder: Path, name: str, splits: Iterable[str]) -> None:
    """A card that gives the files a configuration's name."""
    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
