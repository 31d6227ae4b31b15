"""A base's tokenizer, where its files are."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from manylora.types import BaseModelError

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def open_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer of a folder or hub id; None if there is none.

    Raises:
        BaseModelError: there is one, and it needs a package that is missing, or is garbled.
    """
    # transformers makes up an empty tokenizer of the model's family where there are no files.
    place = Path(folder)
    if place.is_dir() and not any(any(place.glob(name)) for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if not place.is_dir() and isinstance(error, OSError | ValueError | KeyError):
            return None
        raise BaseModelError(
            f"the tokenizer of base {folder} cannot be opened ({type(error).__name__}: {error}); "
            "install what it needs, or mend or remove its files"
        ) from error
