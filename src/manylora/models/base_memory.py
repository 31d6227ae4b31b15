"""A base is opened only where a device has the memory that it takes."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from manylora.kernels import DTYPES
from manylora.models.quantized import BITS, BLOCK
from manylora.types.machine import free_host_bytes, freed_heap_bytes
from manylora.types.memory import admit, bytes_text
from manylora.types.weight_forms import Quantization

# Of the scale of a block of quantised numbers.
SCALE_BYTES = 4


def free_bytes(device: torch.device) -> int:
    """Return the bytes that could be taken on this device now."""
    if device.type == "cuda":
        # What torch's allocator keeps of freed memory is there for the next allocation.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_host_bytes() + freed_heap_bytes()


def opened_dtype(config: Any, dtype: str) -> torch.dtype:
    """Return the dtype that a base's weights are opened in: the named one, or as stored."""
    text = config.get_text_config()
    named = DTYPES.get(dtype) or getattr(config, "dtype", None) or text.dtype or torch.float32
    return named if isinstance(named, torch.dtype) else getattr(torch, named)


def base_bytes(model: nn.Module, dtype: torch.dtype, quantization: Quantization | None) -> int:
    """Return the bytes of a base's weights once it is open, by a model that was made from its
    configuration and may be on torch's meta device."""
    whole = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if quantization is None:
        return whole
    kept = BITS[quantization] / 8 + SCALE_BYTES / BLOCK
    return whole - int(_quantized_numbers(model) * (dtype.itemsize - kept))


def admit_base(
    name: str,
    config: Any,
    dtype: str,
    device: torch.device,
    *,
    quantization: Quantization | None = None,
    processes: int = 1,
) -> None:
    """Let a base be read, if there is room for its weights, or for the share that each of so many
    `processes` has of them. Raises DoesNotFit."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = opened_dtype(config, dtype)
    needed = base_bytes(model, found, quantization) // processes
    numbers = sum(parameter.numel() for parameter in model.parameters())
    free = free_bytes(device)
    told = str(found).removeprefix("torch.") if quantization is None else quantization
    what = f"base {name!r} ({numbers:,} parameters in {told})"
    fits = (
        f"one of {bytes_text(free)} would fit: fewer bits (quantization: nf4), more processes "
        "(mesh), or a smaller base"
    )
    admit(what, needed, free, fits)


def _quantized_numbers(model: Any) -> int:
    head = model.get_output_embeddings()
    return sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
