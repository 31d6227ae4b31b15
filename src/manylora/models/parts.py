"""Opening a rank's part of a base: the model is made without values, split, shared out, filled.

Memory is bounded by the rank's own part and one tensor's part as stored.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig

from manylora.models import attention
from manylora.models.files import STORED, TensorFiles
from manylora.models.gathering import Shared, share_out
from manylora.models.splitting import Part, split_model
from manylora.parallel import Mesh
from manylora.types import BaseModelError, Unsupported

# Values of a tensor that enter the fingerprint.
SAMPLED = 256


@dataclass(slots=True)
class OpenedPart:
    """A rank's model; how its head is gathered; what the whole base's fingerprint is."""

    model: Any
    head: Shared
    fingerprint: str


def open_part(
    folder: str, config: Any, dtype: torch.dtype | None, device: torch.device, mesh: Mesh
) -> OpenedPart:
    """Open this rank's part of a base.

    Args:
        dtype: None = as stored.

    Raises:
        BaseModelError: no safetensors files, or not this model's.
        Unsupported: a family that cannot be split, or a quantised base.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise Unsupported(f"base {folder!r} is quantised; a mesh opens fp32, bf16 and fp16 bases")
    files = TensorFiles(folder)
    model = _empty_model(folder, config, dtype or _stored_dtype(config, files))
    sources = _sources(model, files, folder)
    whole = _fingerprint(model, files, sources)
    parts = split_model(model, mesh.tp)
    model.requires_grad_(False)
    head = share_out(model, mesh)
    _fill(model, files, sources, parts, device, mesh)
    return OpenedPart(model, head, whole)


def sampled_fingerprint(values: Mapping[str, tuple[tuple[int, ...], torch.dtype, Tensor]]) -> str:
    """SHA-256 over tensors' names, shapes, dtypes and values; see `base.fingerprint`."""
    digest = hashlib.sha256()
    for name, (shape, dtype, sample) in sorted(values.items()):
        digest.update(json.dumps([name, list(shape), str(dtype)]).encode())
        digest.update(sample.to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def sampling_stride(numel: int) -> int:
    """Every so many values of a flattened tensor are sampled, `SAMPLED` + 1 at most."""
    return max(1, numel // SAMPLED)


def _empty_model(folder: str, config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME
        )
    kept = model._keep_in_fp32_modules_strict or (
        dtype == torch.float16 and model._keep_in_fp32_modules
    )
    if kept and dtype != torch.float32:
        raise Unsupported(
            f"base {folder!r} ({type(model).__name__}) keeps {sorted(kept)} in fp32 beside "
            f"{dtype}; a mesh opens it with dtype fp32"
        )
    with suppress(OSError):  # it may have none; the one made of the config stands
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _fill_buffers(model)
    return model


@torch.no_grad()
def _fill_buffers(model: Any) -> None:
    """Rotary frequencies and the like, which the files do not hold, as transformers makes them.

    Raises:
        Unsupported: it does not make one of them anew.
    """
    owners = [m for m in model.modules() if any(True for _ in m.buffers(recurse=False))]
    stored = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    stored -= set(model.all_tied_weights_keys)
    if stored:
        raise Unsupported(
            f"{type(model).__name__} has stored buffers {sorted(stored)}; use one process"
        )
    made: list[list[Tensor]] = []
    for number in (0, 1):
        # What is left of two different numbers was not filled in.
        for owner in owners:
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner._buffers[name] = torch.full_like(buffer, number, device="cpu")
            model._init_weights(owner)
        made.append([buffer.clone() for owner in owners for buffer in owner.buffers(recurse=False)])
    if not all(torch.equal(first, second) for first, second in zip(*made, strict=True)):
        raise Unsupported(f"{type(model).__name__} has buffers that a mesh cannot make anew")


def _stored_dtype(config: Any, files: TensorFiles) -> torch.dtype:
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if named is not None:
        return named
    return STORED[next(iter(files.stored.values())).kind][0]


def _sources(model: Any, files: TensorFiles, folder: str) -> dict[str, str]:
    """For each tensor of the model the name that it has in the files."""
    values = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    sources: dict[str, str] = {}
    for name, value in values.items():
        # A tied tensor is stored under one of its names; a bare backbone has no prefix.
        same = [name, *(other for other, tensor in values.items() if tensor is value)]
        tried = [n for one in same for n in (one, one.removeprefix(prefix), prefix + one)]
        found = next((n for n in tried if n in files.stored), None)
        if found is None or files.stored[found].shape != tuple(value.shape):
            what = "is missing" if found is None else f"has shape {files.stored[found].shape}"
            raise BaseModelError(
                f"base {folder!r}: {name} {what} in its files, but {type(model).__name__} needs "
                f"{tuple(value.shape)}; open it on one process and save it again"
            )
        sources[name] = found
    return sources


def _fingerprint(model: Any, files: TensorFiles, sources: Mapping[str, str]) -> str:
    values = {}
    for name, value in model.state_dict(keep_vars=True).items():
        sample = files.every(sources[name], sampling_stride(value.numel()), SAMPLED + 1)
        values[name] = (tuple(value.shape), value.dtype, sample)
    return sampled_fingerprint(values)


def _fill(
    model: Any,
    files: TensorFiles,
    sources: Mapping[str, str],
    parts: Mapping[str, Part],
    device: torch.device,
    mesh: Mesh,
) -> None:
    """Read this rank's parameters, and bring the buffers to the device."""
    done: dict[int, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if id(old) not in done:
            shape = files.stored[sources[name]].shape
            slices = [slice(0, size) for size in shape]
            part = parts.get(name)
            if part is not None:
                slices[part.dim] = slice(part.start, part.stop)
            if isinstance(old, DTensor):
                first, last = mesh.dp.share(old.shape[0])
                begin = slices[0].start
                slices[0] = slice(begin + first, begin + last)
            stored = files.part(sources[name], slices)
            # Copied, so that nothing of the mapped file stays.
            values = torch.empty(stored.shape, dtype=old.dtype, device=device).copy_(stored)
            done[id(old)] = _parameter(values, old)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = done[id(old)]
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    """The values in the place of a parameter that had none."""
    if isinstance(like, DTensor):
        values = DTensor.from_local(
            values,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
    return nn.Parameter(values, requires_grad=False)
