"""Tiny random bases, adapters that act, and the hand-made sum that every file is compared with.

B batch, S positions, K in, N out, R LoRA rank, P parameters of an adapter, V vocabulary.
"""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from manylora.lora.layout import Layout
from manylora.lora.sites import Site
from manylora.lora.state import Floats

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
    "pad_token_id": 0,
}
# Sites that read the same tensor, by parent module.
SHARED_INPUT = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}


def tiny_base(family: str) -> PreTrainedModel:
    """A random three-layer base; Qwen3's embeddings are tied, Phi3's projections are fused.

    Granite divides its logits, Cohere multiplies them.
    """
    torch.manual_seed(7)
    config = {
        "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
        "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
        "phi3": lambda: Phi3Config(**SIZES, tie_word_embeddings=False),
        "granite": lambda: GraniteConfig(**SIZES, logits_scaling=1.5, tie_word_embeddings=False),
        "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.75, tie_word_embeddings=True),
    }[family]()
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def sites_of(model: PreTrainedModel) -> list[Site]:
    """Every linear layer, those with a common input numbered alike."""
    head = model.get_output_embeddings()
    groups: dict[tuple[str, str], int] = {}
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            parent, _, leaf = name.rpartition(".")
            group = groups.setdefault((parent, SHARED_INPUT.get(leaf, leaf)), len(groups))
            k, n = module.in_features, module.out_features
            sites.append(Site(name, k, n, group, is_head=module is head))
    return sites


def acting_weights(layout: Layout, seed: int = 3) -> Floats:
    """Random factors [P], B ≠ 0, so large that a wrong one shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    return (0.15 * torch.randn(layout.num_params, generator=generator)).numpy()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """[B, S, V] for two fixed prompts."""
    generator = torch.Generator().manual_seed(11)
    tokens_BS = torch.randint(1, SIZES["vocab_size"], (2, 9), generator=generator)
    return model(input_ids=tokens_BS).logits


@torch.no_grad()
def summed_logits(base: PreTrainedModel, layout: Layout, weights: Floats) -> torch.Tensor:
    """Logits of the base with scale·B·A added to its weights, element by element of the layout.

    Reads the vector by plain slicing, so that it shares no code with the exporters.
    """
    weights_P = torch.from_numpy(weights)
    model = copy.deepcopy(base)
    head = model.get_output_embeddings()
    assert head is not None
    head.weight = torch.nn.Parameter(head.weight.clone())  # untied: the embedding stays
    for f in layout.factors:
        a_RK = weights_P[f.a_start :][: f.rank * f.in_features].reshape(f.rank, f.in_features)
        bt_RN = weights_P[f.b_start :][: f.rank * f.out_features].reshape(f.rank, f.out_features)
        weight_NK = model.get_parameter(f"{f.site}.weight")
        weight_NK += f.scale * torch.einsum("rn,rk->nk", bt_RN, a_RK)
    return logits_of(model)
