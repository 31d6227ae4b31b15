"""A rank's part of a base is made without values, split, quantised, shared out, and filled.

Memory is bounded by the rank's own part and one tensor's part as stored. One process is a mesh of
one rank.

N output features, K input features.
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
from manylora.models.fully_sharded import Shared, share_out
from manylora.models.quantized import (
    kept,
    quantize_linears,
    quantized_fingerprint,
    quantized_linears,
)
from manylora.models.splitting import WeightPart, split_model
from manylora.models.weight_files import STORED, TensorFiles
from manylora.parallel import Mesh
from manylora.types import BaseModelError, Unsupported
from manylora.types.weight_forms import Quantization

# Values of a tensor that enter the fingerprint.
SAMPLED = 256


@dataclass(slots=True)
class OpenedPart:
    """An `OpenedPart` has a rank's model, its head's gathering and the whole base's fingerprint."""

    model: Any
    head: Shared
    fingerprint: str


def open_part(
    folder: str,
    config: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    mesh: Mesh,
    quantization: Quantization | None = None,
) -> OpenedPart:
    """Open this rank's part of a base.

    Args:
        dtype: None = as stored.
        quantization: how the weights of linear layers are to be kept; None = in `dtype`.

    Raises:
        BaseModelError: no safetensors files, or not this model's.
        Unsupported: a family that cannot be split, layers that cannot be quantised, or a base
            whose files are quantised already.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise Unsupported(
            f"the files of base {folder!r} are quantised already; on a mesh, and with a "
            "quantization of ours, a base is read from fp32, bf16 or fp16 files"
        )
    files = TensorFiles(folder)
    model = _empty_model(folder, config, dtype or _stored_dtype(config, files))
    sources = _sources(model, files, folder)
    whole = _fingerprint(model, files, sources)
    parts = split_model(model, mesh.tp)
    model.requires_grad_(False)
    if quantization is not None:
        quantize_linears(model, quantization)
        whole = quantized_fingerprint(whole, quantization)
    head = share_out(model, mesh)
    _Filling(model, files, sources, parts, device, mesh).fill()
    return OpenedPart(model, head, whole)


def sampled_fingerprint(values: Mapping[str, tuple[tuple[int, ...], torch.dtype, Tensor]]) -> str:
    """Return the SHA-256 over tensors' names, shapes, dtypes and values; see `base.fingerprint`."""
    digest = hashlib.sha256()
    for name, (shape, dtype, sample) in sorted(values.items()):
        digest.update(json.dumps([name, list(shape), str(dtype)]).encode())
        digest.update(sample.to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def sampling_stride(numel: int) -> int:
    """Return the stride that samples a flattened tensor: `SAMPLED` + 1 values at most."""
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
    """Fill in rotary frequencies and the like, which no file holds, as transformers makes them.
    Raises Unsupported: it does not make one of them anew."""
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
    """Return, for each tensor of the model, the name that it has in the files."""
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


@dataclass(slots=True)
class _Filling:
    """A `_Filling` reads a rank's parameters from the files, and brings buffers to the device."""

    model: Any
    files: TensorFiles
    sources: Mapping[str, str]
    parts: Mapping[str, WeightPart]
    device: torch.device
    mesh: Mesh

    def fill(self) -> None:
        """Give every parameter its values, and every buffer its device."""
        for name, layer in quantized_linears(self.model):
            self._fill_quantized(f"{name}.weight", layer)
        done: dict[int, nn.Parameter] = {}
        for name, old in list(self.model.named_parameters(remove_duplicate=False)):
            if not old.is_meta:
                continue
            if id(old) not in done:
                stored = self._stored(name, old)
                # Copied, so that nothing of the mapped file stays.
                values = torch.empty(stored.shape, dtype=old.dtype, device=self.device)
                done[id(old)] = _parameter(values.copy_(stored), old)
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent)._parameters[leaf] = done[id(old)]
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(self.device)

    def _fill_quantized(self, name: str, layer: nn.Linear) -> None:
        whole, owner = kept(layer)
        # Codes and scales are shared out by rows, as the weight would be.
        weight_NK = self._stored(name, owner.original0).to(self.device)
        for leaf, values in zip(
            ("original0", "original1"), whole.right_inverse(weight_NK), strict=True
        ):
            owner._parameters[leaf] = _parameter(values, owner._parameters[leaf])

    def _stored(self, name: str, like: Tensor) -> Tensor:
        """Return this rank's part of a parameter, as stored; it has the rows that `like` is of."""
        source = self.sources[name]
        slices = [slice(0, size) for size in self.files.stored[source].shape]
        part = self.parts.get(name)
        if part is not None:
            slices[part.dim] = slice(part.start, part.stop)
        if isinstance(like, DTensor):
            first, last = self.mesh.dp.share(like.shape[0])
            begin = slices[0].start
            slices[0] = slice(begin + first, begin + last)
        return self.files.part(source, slices)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    """Make the values a parameter, for the place of one that had none."""
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
