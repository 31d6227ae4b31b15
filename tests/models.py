"""Tiny random bases of every supported family are made here, as Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "cohere",
)
# Families that ask something odd of attention: a window that only the mask tells, two calls in each
# layer, chunks.
ODD = ("qwen2_moe", "diffllama", "cohere2", "llama4_text")
VOCAB = 160

# A window shorter than the sequences of the tests, and layers with it beside layers without.
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
PECULIARITIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": SLIDING,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 4.0,
    },
    # Factors far from 1 on either side: one divides the logits, the other multiplies them.
    "granite": {
        "logits_scaling": 3.0,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.25,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "cohere2": {"sliding_window": 8, "layer_types": SLIDING},
    "llama4_text": {
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "cohere": {"logit_scale": 0.4, "use_qk_norm": False},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": SLIDING},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return a config of three layers and four heads on two key-value heads, with `overrides`."""
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "initializer_range": 0.08,  # large enough for attention to differ from an average
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family not in ("phi3", "cohere", "qwen2_moe", "diffllama"):
        fields["head_dim"] = 16
    return AutoConfig.for_model(family, **{**fields, **PECULIARITIES.get(family, {}), **overrides})


def tiny_model(family: str, **overrides: Any) -> Any:
    """Make a random model of this family, always the same."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()


class TinyBases:
    """`TinyBases` returns folders of tiny bases, each made once."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[str, Path] = {}

    def __call__(self, family: str, **overrides: Any) -> Path:
        key = json.dumps([family, overrides], sort_keys=True, default=str)
        if key not in self.made:
            folder = self.root / f"{family}-{len(self.made)}"
            tiny_model(family, **overrides).save_pretrained(folder)
            self.made[key] = folder
        return self.made[key]
