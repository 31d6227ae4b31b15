"""Opening a base model: any Hugging Face causal LM, by folder, hub id or the name `seedling`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hub_logging

from manylora.models import attention
from manylora.models.agreement import check_agreement
from manylora.models.base import DTYPES, SEEDLING, BaseModel, Head, fingerprint, resolve_base
from manylora.models.gathering import Shared
from manylora.models.parts import OpenedPart, open_part
from manylora.models.quantized import check_quantization
from manylora.models.splitting import SplitLinear
from manylora.models.tokenizer import open_tokenizer
from manylora.models.vocabulary import answer_ends
from manylora.parallel import Mesh
from manylora.types import BaseModelError, Unsupported
from manylora.types.mesh import MeshShape

# Rotary variants that choose their frequencies by the longest position in the batch: beyond the
# original length one tenant's long sequence would change another's numbers.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def open_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    mesh: Mesh | None = None,
) -> BaseModel:
    """Load a base, freeze it, and check that packed streams give its own numbers.

    Args:
        name: `seedling`, a folder, or a hub id.
        dtype: `auto` (as stored), `fp32`, `bf16` or `fp16`.
        device: `auto` (CUDA if there is one), or a torch device.
        quantization: `nf4` or `int8` keeps the linear layers' weights so; None = in `dtype`.
        mesh: of which this rank opens its part; every rank opens the same base.

    Raises:
        ConfigError: there is no such quantization, or its library is not installed.
        BaseModelError: not found, unreadable, or not a causal LM.
        Unsupported: a packed stream would change its numbers, or this mesh cannot split it.
    """
    folder, place = resolve_base(name), _device(device)
    mesh = mesh or Mesh.join(MeshShape(), place)
    kind = check_quantization(quantization)
    hub_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
        if mesh.shape.size > 1 or kind is not None:
            opened = open_part(folder, config, DTYPES.get(dtype), place, mesh, kind)
        else:
            opened = _open_whole(folder, dtype, place)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"cannot open base {str(name)!r}: {error}. Name `{SEEDLING}`, a folder with "
            "config.json and safetensors, or a hub id"
        ) from error
    model = opened.model.eval()
    _silence_dropout(model)
    text_config = config.get_text_config()
    head = _head(model, text_config, mesh, opened.head)
    tokenizer = open_tokenizer(folder)
    base = BaseModel(
        name=str(name),
        folder=folder,
        model=model,
        backbone=_backbone(model),
        head=head,
        tokenizer=tokenizer,
        context_length=_context_length(text_config),
        eos_token_ids=answer_ends(model, tokenizer),
        vocab_size=head.vocab,
        device=place,
        dtype=head.weight_VH.dtype,
        fingerprint=opened.fingerprint,
        mesh=mesh,
        quantization=kind,
    )
    check_agreement(base)
    return base


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _open_whole(folder: str, dtype: str, place: torch.device) -> OpenedPart:
    """As transformers loads it."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES.get(dtype, dtype), attn_implementation=attention.NAME
    )
    model.to(place).requires_grad_(False)
    return OpenedPart(model, Shared(), fingerprint(model))


def _silence_dropout(model: nn.Module) -> None:
    # The base is frozen: its own dropout must not act when a block runs in training mode.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _head(model: Any, config: Any, mesh: Mesh, shared: Shared) -> Head:
    layer = model.get_output_embeddings()
    if type(layer) not in (nn.Linear, SplitLinear):
        raise Unsupported(
            f"the output head is a {type(layer).__name__}; only nn.Linear is supported"
        )
    name = next(n for n, module in model.named_modules() if module is layer)
    softcap = getattr(config, "final_logit_softcapping", None)
    axis = mesh.tp if mesh.tp.size > 1 else None
    return Head(layer, None if softcap is None else float(softcap), name, axis, shared)


def _backbone(model: Any) -> Any:
    if model.base_model is not model:
        return model.base_model
    # Llama 4's does not say where its text model is: it is all that there is beside the head.
    others = [part for part in model.children() if part is not model.get_output_embeddings()]
    if len(others) != 1:
        raise Unsupported(f"{type(model).__name__} does not tell its backbone from its head")
    return others[0]


def _context_length(config: Any) -> int:
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    variants = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    for variant in variants:
        if variant.get("rope_type") in BATCH_DEPENDENT_ROPE:
            original = variant.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            longest = min(longest, int(original or longest))
    return longest
