"""A base's tokenizer, where its files are."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def open_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer of a folder or hub id; None if there is none."""
    # transformers makes up an empty tokenizer of the model's family where there are no files.
    place = Path(folder)
    if place.is_dir() and not any(any(place.glob(name)) for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None
