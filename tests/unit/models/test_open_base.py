"""Opening a base: what it says of itself, and what is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.models import open_base
from manylora.models.base import checkpoint_activations, fingerprint
from manylora.models.linears import find_linears
from manylora.types import BaseModelError, Unsupported
from tests.models import FAMILIES, VOCAB


def test_a_base_knows_itself(tiny):
    base = open_base(tiny("qwen3", tie_word_embeddings=True))
    assert (base.context_length, base.vocab_size, base.eos_token_ids) == (128, VOCAB, (2,))
    assert base.dtype == torch.float32 and base.head.name == "lm_head"
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer is None
    assert open_base(tiny("llama"), dtype="bf16").dtype == torch.bfloat16
    assert open_base(tiny("gemma2")).head.softcap == 5.0


@pytest.mark.parametrize(
    ("family", "fields", "factor"),
    [
        ("llama", {}, 1.0),
        ("llama", {"logits_scaling": 4.0}, 1.0),  # a field that this family does not read
        ("granite", {"logits_scaling": 8.0}, 1 / 8),
        ("hyperclovax", {"logits_scaling": 8.0}, 8.0),  # the same field, the other way
        ("cohere", {"logit_scale": 0.0625}, 0.0625),
        ("gemma2", {}, 1.0),
    ],
)
def test_the_logits_factor_is_found_by_asking_the_model(tiny, family: str, fields, factor: float):
    assert open_base(tiny(family, **fields)).head.factor == factor


def test_what_cannot_be_opened_says_what_can(tmp_path: Path):
    with pytest.raises(BaseModelError) as caught:
        open_base(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_grouped_by_the_tensor_they_read(tiny, family: str):
    found = find_linears(open_base(tiny(family)))
    groups: dict[int, list[str]] = {}
    for linear in found:
        groups.setdefault(linear.group, []).append(linear.name.rpartition(".")[2])
    fused = [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    apart = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    # Attention and MLP side by side.
    parallel = [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]]
    layers = {"phi3": fused, "cohere": parallel}.get(family, apart) * 3
    assert [sorted(g) for g in groups.values()] == [sorted(g) for g in [*layers, ["lm_head"]]]
    assert [linear.is_head for linear in found] == [False] * (len(found) - 1) + [True]
    assert found[0].name.startswith("model.layers.0.")


ROPE = {"rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
DYNAMIC = {**ROPE, "rope_type": "dynamic", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        # Beyond its original length, one long sequence would change the others' frequencies.
        (LONGROPE, 32),
        (DYNAMIC, 64),
        ({**ROPE, "rope_type": "linear"}, 128),
        ({"rope_type": "default", "rope_theta": 1e4}, 128),
    ],
)
def test_context_length(tiny, rope: dict, expected: int):
    assert open_base(tiny("llama", rope_parameters=rope)).context_length == expected


def test_a_model_whose_numbers_would_change_is_refused(tiny, monkeypatch: pytest.MonkeyPatch):
    """The self-check at opening: attention that leaks between sequences is found."""

    def leaky(module, query, key, value, *_args, **_kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2), None

    from transformers import AttentionInterface

    from manylora.models import attention

    AttentionInterface.register(attention.NAME, leaky)
    try:
        with pytest.raises(Unsupported, match="other logits than the model alone"):
            open_base(tiny("llama"))
    finally:
        AttentionInterface.register(attention.NAME, attention.packed_attention)


def test_the_fingerprint_sees_a_changed_weight(tiny, tmp_path: Path):
    folder = tiny("llama")
    base = open_base(folder)
    assert base.fingerprint == open_base(folder).fingerprint
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_base(tmp_path).fingerprint != base.fingerprint
    assert fingerprint(base.model) == base.fingerprint


def test_checkpointing_needs_support(tiny):
    base = open_base(tiny("llama"))
    base.model.supports_gradient_checkpointing = False
    with pytest.raises(Unsupported, match="no activation checkpointing"):
        checkpoint_activations(base)


def test_the_bases_own_dropout_is_silent(tiny, tmp_path: Path):
    folder = tiny("llama", attention_dropout=0.5)
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0.5
    base = open_base(folder)
    assert all(getattr(m, "attention_dropout", 0.0) == 0.0 for m in base.backbone.modules())
