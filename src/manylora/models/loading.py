"""Any Hugging Face causal LM is opened as a base, by folder, hub id or the name `seedling`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hub_logging

from manylora.kernels import DTYPES
from manylora.models import attention
from manylora.models.agreement import check_agreement
from manylora.models.base import BaseModel, find_backbone, find_head, fingerprint, resolve_base
from manylora.models.base_memory import admit_base
from manylora.models.fully_sharded import Shared
from manylora.models.loading_in_parts import OpenedPart, open_part
from manylora.models.quantized import check_quantization
from manylora.models.stored import check_config, check_folder, library_errors
from manylora.models.tokenizer import open_tokenizer
from manylora.models.trial import try_twin
from manylora.models.vocabulary import answer_ends
from manylora.parallel import Mesh
from manylora.types import BaseModelError
from manylora.types.mesh_shape import MeshShape
from manylora.types.weight_forms import Quantization

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
        DoesNotFit: too little memory is free.
        Unsupported: a packed stream would change its numbers, or this mesh cannot split it.
    """
    folder, place = resolve_base(name), _device(device)
    mesh = mesh or Mesh.join(MeshShape(), place)
    kind = check_quantization(quantization)
    hub_logging.disable_progress_bar()
    check_folder(str(name), folder)
    with library_errors(str(name)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_config(str(name), config)
        context_length = _context_length(config.get_text_config())
        try_twin(str(name), config, context_length, place)
        admit_base(str(name), config, dtype, place, quantization=kind, processes=mesh.shape.size)
        if mesh.shape.size > 1 or kind is not None:
            opened = open_part(folder, config, DTYPES.get(dtype), place, mesh, kind)
        else:
            opened = _open_whole(str(name), folder, dtype, place)
        base = _as_base(str(name), folder, opened, context_length, place, mesh, kind)
        check_agreement(base)
    return base


def _as_base(
    name: str,
    folder: str,
    opened: OpenedPart,
    context_length: int,
    place: torch.device,
    mesh: Mesh,
    kind: Quantization | None,
) -> BaseModel:
    model = opened.model.eval()
    _silence_dropout(model)
    head = find_head(model, mesh.tp if mesh.tp.size > 1 else None, opened.head)
    tokenizer = open_tokenizer(folder)
    return BaseModel(
        name=name,
        folder=folder,
        model=model,
        backbone=find_backbone(model),
        head=head,
        tokenizer=tokenizer,
        context_length=context_length,
        eos_token_ids=answer_ends(model, tokenizer),
        vocab_size=head.vocab,
        device=place,
        dtype=head.weight_VH.dtype,
        fingerprint=opened.fingerprint,
        mesh=mesh,
        quantization=kind,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _open_whole(name: str, folder: str, dtype: str, place: torch.device) -> OpenedPart:
    """Load a base as transformers does; values that it would make up are an error."""
    model: Any
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES.get(dtype, dtype),
        attn_implementation=attention.NAME,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BaseModelError(
            f"base {name!r} has no values for {', '.join(missing[:3])}{more}, which "
            f"{type(model).__name__} needs; is it a causal LM, and complete?"
        )
    model.to(place).requires_grad_(False)
    return OpenedPart(model, Shared(), fingerprint(model))


def _silence_dropout(model: Any) -> None:
    # The base is frozen: its own dropout must not act when a block runs in training mode.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


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
