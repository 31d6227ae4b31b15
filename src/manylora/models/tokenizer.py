"""A base's tokenizer is opened from where its files are."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from manylora.types import BaseModelError

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def open_tokenizer(folder: str) -> Any:
    """Open the Hugging Face tokenizer of a folder or hub id; None if there is none. Raises
    BaseModelError: there is one, and it needs a package that is missing, or is garbled."""
    # transformers makes up an empty tokenizer of the model's family where there are no files.
    place = Path(folder)
    if place.is_dir() and not any(any(place.glob(name)) for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if not place.is_dir() and isinstance(error, OSError | ValueError | KeyError):
            return None
        raise BaseModelError(
            f"the tokenizer of base {folder} cannot be opened ({type(error).__name__}: {error}); "
            "install what it needs, or mend or remove its files"
        ) from error
    _settle_clean_up(tokenizer)
    return tokenizer


def _settle_clean_up(tokenizer: Any) -> None:
    """Take back a flag that does nothing but warn.

    Many files ask for `clean_up_tokenization_spaces`. transformers leaves the texts of byte-pair
    tokenizers as they are all the same, and says so on the first `decode` of every run.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if type(getattr(backend, "model", None)).__name__ == "BPE" and not getattr(
        tokenizer, forced, False
    ):
        tokenizer.clean_up_tokenization_spaces = False
