"""A base's files say how many tokens it knows, and which end an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig

from manylora.types import BaseModelError


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A `Vocabulary` tells of a base's tokens.

    Attributes:
        size: rows of its embedding; None = the files do not say.
        ends: tokens that end an answer by the model's own files.
        named_in: the file that names them; "" = none does.
    """

    size: int | None
    ends: tuple[int, ...]
    named_in: str


def read_vocabulary(folder: str) -> Vocabulary:
    """Read a base's files (a folder, or a hub id whose files are here). Raises BaseModelError:
    there is no readable config.json."""
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"cannot read config.json of {folder!r}: {error}") from error
    try:
        generation: Any = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError):  # many bases have none
        generation = None
    text_config = config.get_text_config()
    size = getattr(text_config, "vocab_size", None)
    named = (
        ("generation_config.json", generation),
        ("config.json", config),
        ("config.json", text_config),
    )
    for file, holder in named:
        ends = token_ids(getattr(holder, "eos_token_id", None))
        if ends:
            return Vocabulary(size, ends, file)
    return Vocabulary(size, (), "")


def answer_ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: the model's, and the tokenizer's, which training puts
    behind what is learned. (transformers' Trainer adds it to the model's in the same way.)"""
    own = token_ids(getattr(model.generation_config, "eos_token_id", None))
    for config in (model.config, model.config.get_text_config()):
        own = own or token_ids(getattr(config, "eos_token_id", None))
    return tuple(dict.fromkeys((*own, *token_ids(getattr(tokenizer, "eos_token_id", None)))))


def token_ids(value: Any) -> tuple[int, ...]:
    """Return one token, several, or none, as files have them."""
    if value is None:
        return ()
    return tuple(map(int, value)) if isinstance(value, Sequence) else (int(value),)
