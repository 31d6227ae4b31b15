"""Folders that cannot be opened: each is refused by our error, with folder, cause and remedy."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.models import open_base
from manylora.types import BaseModelError, ManyloraError, Unsupported


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "base"))


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(folder: Path, kind: type[ManyloraError], *words: str) -> ManyloraError:
    with pytest.raises(kind) as caught:
        open_base(folder)
    message = str(caught.value)
    assert str(folder) in message and "'manylora'" not in message
    for word in words:
        assert word in message
    return caught.value


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
def test_a_garbled_config(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    refused(folder, BaseModelError, "config.json", "JSON")


def test_no_config(folder: Path):
    (folder / "config.json").unlink()
    refused(folder, BaseModelError, "config.json", "seedling")


@pytest.mark.parametrize("model_type", [None, 3, "no_such_family", "t5", "vit"])
def test_a_family_that_is_none(folder: Path, model_type: Any):
    change(folder, model_type=model_type)
    refused(folder, BaseModelError, "config.json")


@pytest.mark.parametrize("fields", [{"hidden_size": "many"}, {"num_attention_heads": 0}])
def test_a_config_that_makes_no_model(folder: Path, fields: dict[str, Any]):
    change(folder, **fields)
    refused(folder, ManyloraError)


def test_code_of_its_own_is_never_run(folder: Path):
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    change(folder, model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    refused(folder, BaseModelError)


def test_an_encoder(folder: Path):
    change(folder, model_type="bert")
    refused(folder, Unsupported, "causal")


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    refused(folder, BaseModelError, "safetensors")


def test_weights_in_a_pickle(folder: Path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, Unsupported, "pickle", "convert")


def test_a_missing_shard(tiny, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, BaseModelError, lost.name)


def test_truncated_weights(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, BaseModelError)


def test_values_that_are_missing_are_not_made_up(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, BaseModelError, "model.layers.1.mlp.up_proj.weight")


def test_values_of_another_shape(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, BaseModelError)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "torchao", "quant_type": {"default": "int8wo"}},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "mxfp4"},
    ],
    ids=lambda q: q["quant_method"],
)
def test_files_that_are_quantised_already(folder: Path, quantization: dict[str, Any]):
    change(folder, quantization_config=quantization)
    (folder / "model.safetensors").write_bytes(b"never read")
    refused(folder, Unsupported, quantization["quant_method"], "bf16")


@pytest.mark.parametrize("package", ["sentencepiece", "tiktoken", "mistral_common"])
def test_a_package_that_is_missing(folder: Path, package: str, monkeypatch):
    def lacks(*_: Any, **__: Any) -> None:
        raise ImportError(f"it requires {package}; `pip install {package}`")

    (folder / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setattr("manylora.models.tokenizer.AutoTokenizer.from_pretrained", lacks)
    refused(folder, BaseModelError, package, "install")


def test_a_garbled_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text("{")
    error = refused(folder, BaseModelError, "tokenizer")
    assert error.__cause__ is not None


def test_a_folder_that_is_not_there(tmp_path: Path):
    refused(tmp_path / "nowhere", BaseModelError, "no folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", BaseModelError, "no folder")
    assert "mine" not in sys.modules
