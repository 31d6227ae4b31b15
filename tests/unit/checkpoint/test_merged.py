"""Merging: what goes along, and what is refused. (Law 6 has the numbers.)"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from manylora.checkpoint import verify
from manylora.checkpoint.merged import export_merged
from manylora.lora.layout import Layout, plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.types import AdapterSpec, BaseModelError, CheckpointMismatch, NotFinite

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def layout_of(name: str = NAME, k: int = 8, n: int = 12) -> Layout:
    spec = AdapterSpec(rank=2, alpha=4, targets=(name,))
    return plan_layout(spec, resolve_targets(spec, [Site(name, k, n, 0)]))


def merge(tmp_path: Path, base: Path, layout: Layout, fill: float = 1.0) -> None:
    export_merged(tmp_path / "out", base, layout, np.full(layout.num_params, fill, np.float32))


def test_the_tokenizer_goes_along(tmp_path: Path, base: Path):
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base)
    merge(tmp_path, base, layout_of())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer is not None and tokenizer("hello")["input_ids"] == [1]
    manifest = verify(tmp_path / "out", "manylora.json", kind="merged-model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest.files)


def test_a_base_without_a_tokenizer_is_merged_with_a_warning(tmp_path: Path, base: Path, caplog):
    with caplog.at_level(logging.WARNING, logger="manylora.checkpoint"):
        merge(tmp_path, base, layout_of())
    assert "no tokenizer" in caplog.text
    verify(tmp_path / "out", "manylora.json")


def test_a_temperature_without_do_sample_goes_along(tmp_path: Path, base: Path):
    """transformers reads such a file and refuses to write it."""
    fields = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 4]}
    (base / "generation_config.json").write_text(json.dumps(fields))
    merge(tmp_path, base, layout_of())
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written[name] for name in fields} == fields
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.generation_config.eos_token_id == [3, 4]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of("model.layers.7.mlp.up_proj"), "no module model.layers.7"),
        (layout_of(n=10), r"is \[12, 8\] in the base; its factors are for \[10, 8\]"),
        (replace(layout_of(), num_params=3), "weights have shape|the layout needs"),
    ],
)
def test_factors_of_another_base_are_refused(tmp_path: Path, base: Path, layout, message: str):
    weights_P = np.zeros(layout_of(n=layout.factors[0].out_features).num_params, np.float32)
    with pytest.raises(CheckpointMismatch, match=message):
        export_merged(tmp_path / "out", base, layout, weights_P)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_is_not_finite_is_refused(tmp_path: Path, base: Path):
    with pytest.raises(NotFinite, match=NAME):
        merge(tmp_path, base, layout_of(), fill=1e30)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(BaseModelError, match="nowhere"):
        merge(tmp_path, tmp_path / "nowhere", layout_of())
