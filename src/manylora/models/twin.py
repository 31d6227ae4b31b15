"""A base's twin has its class and config, but is narrow, with windows so small that long is short.

What a base does at its windows' ends cannot be tried on the base itself: 4,096 tokens of seven
billion parameters are minutes. The twin has as many layers, of the same kinds in the same order,
and random values; its windows are a few tokens long.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from manylora.models.sight import NAME
from manylora.models.stored import sub_configs
from manylora.types import Unsupported

# Windows and chunks of a twin, in tokens.
WINDOW = 8
VOCAB = 128
# A twin of more parameters gets fewer layers.
MOST_PARAMETERS = 1 << 26
FEW_LAYERS = 12

# Sizes that only make a model wide, and what they become at most.
WIDTHS = {
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "ffn_hidden_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "ffn_config": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "moe_ffn_hidden_size": 16,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
}
# Larger, and families that do not scale attention's scores down blow rounding up to a difference.
GAIN = 0.7
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")


def make_twin(config: Any, device: torch.device) -> Any:
    """Make a model of this config's class in fp64, whose attention is ours; the config stays as it
    is. Raises Unsupported: no such model can be made."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    for part in {id(c): c for c in (config, *sub_configs(config))}.values():
        if part is config or part is text:
            _narrow(part)
        elif isinstance(getattr(part, "num_hidden_layers", None), int):
            part.num_hidden_layers = 1  # of what reads pictures or sound
    try:
        if _parameters(config) > MOST_PARAMETERS:
            _shorten(text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _made(config)
            _draw_weights(model)
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (NAME,):
            raise Unsupported("transformers lets nobody replace its attention") from error
        raise Unsupported(
            f"{config.model_type} cannot be made small enough to be tried "
            f"({type(error).__name__}: {error})"
        ) from error
    return model.to(device).eval().requires_grad_(False)


def _narrow(config: Any) -> None:
    """Set few heads of the true size, narrow layers between, a small vocabulary, small windows."""
    heads, hidden = _get(config, "num_attention_heads"), _get(config, "hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int):
        groups = _get(config, "num_key_value_heads") or heads
        size = _get(config, "head_dim") or hidden // heads
        if isinstance(groups, int) and isinstance(size, int):
            few = min(groups, 2)
            many = few * min(max(heads // groups, 1), 2)
            _set(config, "num_attention_heads", many)
            _set(config, "num_key_value_heads", few)
            _set(config, "hidden_size", many * size)
    for field, most in WIDTHS.items():
        value = _get(config, field)
        if isinstance(value, Sequence) and all(isinstance(v, int) for v in value):
            _set(config, field, [min(v, most) for v in value])
        elif isinstance(value, int) and value > most:
            _set(config, field, most)
    for field, value in list(vars(config).items()):
        size = isinstance(value, int) and not isinstance(value, bool) and value > WINDOW
        if size and ("window" in field or "chunk" in field) and "layers" not in field:
            _set(config, field, WINDOW)
    for field in TOKENS:
        _set(config, field, 0)


def _get(config: Any, field: str) -> Any:
    with suppress(Exception):  # a field that differs between layers refuses to be read
        return getattr(config, field)
    return None


def _set(config: Any, field: str, value: Any) -> None:
    if _get(config, field) is not None:
        setattr(config, field, value)


def _shorten(config: Any) -> None:
    """Keep fewer layers, and of every list of what they are the beginning."""
    layers = config.num_hidden_layers
    if layers <= FEW_LAYERS:
        return
    for field, value in list(vars(config).items()):
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == layers:
            setattr(config, field, value[:FEW_LAYERS])
    config.num_hidden_layers = FEW_LAYERS


def _parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _made(config).parameters())


def _made(config: Any) -> Any:
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"  # the others have no fp64
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=NAME)


@torch.no_grad()
def _draw_weights(model: nn.Module) -> None:
    """Draw matrices whose outputs are nearly as large as their inputs, so every layer counts."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, GAIN * parameter.shape[-1] ** -0.5)
