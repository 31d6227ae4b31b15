"""Attention over a packed stream, registered with transformers as `manylora`.

T tokens of the stream, n sequences of one length, L tokens of a sequence, H heads, D head
dimension, S sequences.

No token sees another sequence. On CUDA in half precision the variable-length kernel takes the
whole stream; elsewhere each run of equally long sequences is one call, and a sequence's numbers
do not depend on the others of its run.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from manylora.models.stream import PackedStream, current_stream

NAME = "manylora"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the stream.

    Args:
        query: [1, H, T, D]; key and value may have fewer heads.
        sliding_window: a token sees this many tokens, itself included.
        softcap: scores become softcap·tanh(scores / softcap).

    Returns:
        [1, T, H, D], as transformers' attention interface asks, and no weights.
    """
    stream = current_stream()
    assert stream is not None, "packed attention outside a stream"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    if stream.cache is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if stream.decoding:
            return _decode(layer, query, key, value, stream, scale, sliding_window, softcap), None
        _fill_cache(layer, key, value, stream)
    if _varlen_serves(query, softcap):
        return _varlen(query, key, value, stream, scale, sliding_window), None
    if groups > 1:
        key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
    return _per_run(query, key, value, stream, scale, sliding_window, softcap), None


def _per_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: PackedStream,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    runs = stream.runs()
    sizes = [count * length for count, length in runs]
    if stream.num_padding:
        sizes.append(stream.num_padding)
    # split, not slicing: its backward is one concatenation rather than a full-size sum per run.
    parts = zip(*(t[0].split(sizes, dim=1) for t in (query, key, value)), strict=True)
    outputs = []
    for (count, length), (q, k, v) in zip(runs, parts, strict=False):
        q_nHLD, k_nHLD, v_nHLD = (
            t.unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v)
        )
        out_nHLD = _attend(q_nHLD, k_nHLD, v_nHLD, scale, window, softcap)
        outputs.append(out_nHLD.transpose(1, 2).flatten(0, 1))
    if stream.num_padding:
        heads, head_dim = query.shape[1], value.shape[3]
        outputs.append(query.new_zeros(stream.num_padding, heads, head_dim))
    return torch.cat(outputs).unsqueeze(0)


def _attend(
    q_nHLD: Tensor,
    k_nHLD: Tensor,
    v_nHLD: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    length = q_nHLD.shape[2]
    whole = window is None or window >= length
    if softcap is not None:
        mask = _causal_mask(length, None if whole else window, q_nHLD.device)
        # One sequence at a time: a batched product's bits would depend on the run's length.
        singles = zip(*(t.split(1) for t in (q_nHLD, k_nHLD, v_nHLD)), strict=True)
        return torch.cat([_softcapped(q, k, v, mask, scale, softcap) for q, k, v in singles])
    if whole:
        return functional.scaled_dot_product_attention(
            q_nHLD, k_nHLD, v_nHLD, is_causal=True, scale=scale
        )
    mask = _causal_mask(length, window, q_nHLD.device)
    return functional.scaled_dot_product_attention(
        q_nHLD, k_nHLD, v_nHLD, attn_mask=mask, scale=scale
    )


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention with capped scores; `mask` is True where a key may be seen."""
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap))
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v


@lru_cache(maxsize=64)
def _causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    back = position[:, None] - position[None, :]
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def _fill_cache(layer: int, key: Tensor, value: Tensor, stream: PackedStream) -> None:
    assert stream.cache is not None
    keys_SHLD, values_SHLD = stream.cache.layer(layer, key)
    start = 0
    for number, length in enumerate(stream.lengths):
        keys_SHLD[number, :, :length] = key[0, :, start : start + length]
        values_SHLD[number, :, :length] = value[0, :, start : start + length]
        start += length


def _decode(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: PackedStream,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One new token of each sequence against its cache; padding rows get zeros."""
    assert stream.cache is not None and stream.decode_positions is not None
    position_S = stream.decode_positions
    count = len(stream.lengths)
    rows = torch.arange(count, device=query.device)
    keys_SHLD, values_SHLD = stream.cache.layer(layer, key)
    keys_SHLD[rows, :, position_S] = key[0, :, :count].transpose(0, 1)
    values_SHLD[rows, :, position_S] = value[0, :, :count].transpose(0, 1)
    # All that any sequence can see; the rest of the buffer need not be read.
    reach = int(position_S.max()) + 1
    keys_SHLD, values_SHLD = keys_SHLD[:, :, :reach], values_SHLD[:, :, :reach]
    back = position_S[:, None] - torch.arange(reach, device=query.device)[None, :]
    mask = (back >= 0) if window is None else (back >= 0) & (back < window)
    q_SH1D = query[0, :, :count].transpose(0, 1).unsqueeze(2)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        keys_SHLD, values_SHLD = (
            kv.repeat_interleave(groups, dim=1) for kv in (keys_SHLD, values_SHLD)
        )
    mask = mask[:, None, None, :]
    if softcap is not None:
        out = _softcapped(q_SH1D, keys_SHLD, values_SHLD, mask, scale, softcap)
    else:
        out = functional.scaled_dot_product_attention(
            q_SH1D, keys_SHLD, values_SHLD, attn_mask=mask, scale=scale
        )
    padding = out.new_zeros(stream.num_padding, *out.shape[1:])
    return torch.cat([out, padding])[:, :, 0].unsqueeze(0)


def _varlen_serves(query: Tensor, softcap: float | None) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and softcap is None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: PackedStream,
    scale: float,
    window: int | None,
) -> Tensor:
    # Here, because the module needs a CUDA build's operators.
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
    cu_seqlens = stream.cu_seqlens(query.device)
    longest = max([*stream.lengths, stream.num_padding])
    left = -1 if window is None else window - 1
    q_THD, k_THD, v_THD = (t[0].transpose(0, 1) for t in (query, key, value))
    out_THD = varlen_attn(
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest,
        scale=scale, window_size=(left, 0),
    )  # fmt: skip
    assert isinstance(out_THD, Tensor)
    return out_THD.unsqueeze(0)


AttentionInterface.register(NAME, packed_attention)
