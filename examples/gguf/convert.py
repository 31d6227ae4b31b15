"""Turns a GGUF file into a Hugging Face folder that manylora opens as a base.

    pip install gguf
    python examples/gguf/convert.py model.gguf bases/model --dtype bfloat16 --eos '<|im_end|>'

transformers reads the file and makes its quantised weights whole again; what the quantisation
lost stays lost. Three things are left to do by hand, and are done here. A model that was read from
a GGUF file refuses to be saved, so its weights move into a plain model of the same configuration.
The end token that the file names is often not the one that ends a turn of chat, so `--eos` names it
for the tokenizer, the configuration and generation alike. And leftovers of the conversion, which
newer releases warn about, are dropped from the tokenizer's settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plain_model(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the file's model as one that can be saved."""
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    config.dtype = dtype
    model = type(read)(config).to(dtype)
    model.load_state_dict(read.state_dict())
    return model.eval()


def end_with(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: str | None) -> None:
    """Makes `eos`, or else the tokenizer's own end token, the end everywhere.

    Raises:
        SystemExit: The vocabulary has no such token.
    """
    if eos is not None:
        if eos not in tokenizer.get_vocab():
            sys.exit(f"the vocabulary has no token {eos!r}; --eos names one of its tokens")
        tokenizer.eos_token = eos
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def drop_leftovers(folder: Path) -> None:
    """Drops settings that only the conversion wrote."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("clean_up_tokenization_spaces", "gguf_file", "is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def convert(source: Path, target: Path, dtype: torch.dtype, eos: str | None) -> None:
    """Writes model, tokenizer and configuration of the GGUF file `source` to the folder `target`.

    Raises:
        SystemExit: `eos` is no token of the vocabulary.
    """
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = plain_model(source, dtype)
    end_with(model, tokenizer, eos)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    drop_leftovers(target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a GGUF file into a Hugging Face folder.")
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--eos", help="the token that ends an answer (default: the file's)")
    given = parser.parse_args()
    convert(given.source, given.target, DTYPES[given.dtype], given.eos)


if __name__ == "__main__":
    main()
