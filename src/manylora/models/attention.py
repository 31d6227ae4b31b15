"""Attention over a packed stream is registered with transformers as `manylora`.

T tokens of the stream, n sequences of one length, L tokens of a sequence, H heads, D head
dimension, S sequences.

No token sees another sequence. On CUDA in half precision the variable-length kernel takes the
whole stream; elsewhere each run of equally long sequences is one call, and a sequence's numbers
do not depend on the others of its run.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from manylora.models.cache import DecodeStep, KeysValues
from manylora.models.sight import NAME, Sight
from manylora.models.stream import PackedStream, current_stream
from manylora.types import Unsupported

# What models hand on to whichever attention function is chosen, and what does not concern ours.
IGNORED = {
    *("position_ids", "cache_position", "use_cache", "past_key_values", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "num_items_in_batch"),
}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence of the stream.

    Args:
        query: [1, H, T, D]; key and value may have fewer heads.
        attention_mask: what a token sees; None = what `sliding_window` says.
        sliding_window: a token sees this many tokens, itself included; a mask says it too, and goes
            before, as in transformers' eager attention.
        softcap: scores become softcap·tanh(scores / softcap).

    Returns:
        [1, T, H, D], as transformers' attention interface asks, and no weights.

    Raises:
        Unsupported: the model asks for something else.
    """
    stream = current_stream()
    assert stream is not None, "packed attention outside a stream"
    if others or dropout or is_causal is False:
        _refuse_unknown(module, dropout, is_causal, others)
    sight = Sight(sliding_window) if attention_mask is None else attention_mask
    if not isinstance(sight, Sight):
        raise Unsupported(f"{type(module).__name__} makes an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    cached = None
    if stream.decoding is not None:
        layers = stream.decoding.rows.cache.layer(stream.next_call(), key, value)
        step = stream.decoding
        return decode_attention(query, key, value, step, layers, scale, sight, softcap), None
    if stream.filling is not None:
        cached = stream.filling.cache.layer(stream.next_call(), key, value)
        _fill(cached, key, value, stream)
    if _varlen_serves(query, sight, softcap) and not any(
        map(stream.kept, range(len(stream.lengths)))
    ):
        return _varlen(query, key, value, stream, scale, sight.window), None
    if groups > 1:
        key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
    return _per_run(query, key, value, stream, cached, scale, sight, softcap), None


def _refuse_unknown(
    module: nn.Module, dropout: float, is_causal: bool | None, others: Mapping[str, Any]
) -> None:
    asked = {name for name, value in others.items() if value is not None} - IGNORED
    if others.get("output_attentions"):
        asked.add("output_attentions")
    if dropout:
        asked.add(f"dropout={dropout}")
    if is_causal is False:
        asked.add("is_causal=False")
    if asked:
        raise Unsupported(
            f"{type(module).__name__} asks its attention for {', '.join(sorted(asked))}, which "
            "manylora's attention does not do"
        )


def _per_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stream: PackedStream,
    cached: KeysValues | None,
    scale: float,
    sight: Sight,
    softcap: float | None,
) -> Tensor:
    runs = stream.runs()
    sizes = [count * length for count, length in runs]
    if stream.num_padding:
        sizes.append(stream.num_padding)
    # split, not slicing: its backward is one concatenation rather than a full-size sum per run.
    parts = zip(*(t[0].split(sizes, dim=1) for t in (query, key, value)), strict=True)
    outputs = []
    number = 0
    for (count, length), (q, k, v) in zip(runs, parts, strict=False):
        first, number = number, number + count
        if stream.kept(first):
            assert cached is not None
            outputs.append(_continued(q, stream, first, cached, scale, sight, softcap))
            continue
        q_nHLD, k_nHLD, v_nHLD = (
            t.unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v)
        )
        out_nHLD = _attend(q_nHLD, k_nHLD, v_nHLD, scale, sight, softcap)
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
    sight: Sight,
    softcap: float | None,
) -> Tensor:
    length = q_nHLD.shape[2]
    whole = sight.covers(length)
    if softcap is not None:
        mask = _causal_mask(length, Sight() if whole else sight, q_nHLD.device)
        # One sequence at a time: a batched product's bits would depend on the run's length.
        singles = zip(*(t.split(1) for t in (q_nHLD, k_nHLD, v_nHLD)), strict=True)
        return torch.cat([_softcapped(q, k, v, mask, scale, softcap) for q, k, v in singles])
    mask = None if whole else _causal_mask(length, sight, q_nHLD.device)
    return functional.scaled_dot_product_attention(
        q_nHLD, k_nHLD, v_nHLD, attn_mask=mask, is_causal=whole, scale=scale
    )


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attend with capped scores; `mask` is True where a key may be seen."""
    # As `Head.scaled_` caps logits, but to the bits of transformers' attention, and for autograd.
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap))
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v


@lru_cache(maxsize=64)
def _causal_mask(length: int, sight: Sight, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    return sight.seen(place[:, None], place)


def _fill(cached: KeysValues, key: Tensor, value: Tensor, stream: PackedStream) -> None:
    """Keep the stream's keys and values."""
    filling = stream.filling
    assert filling is not None
    start = 0
    for extent, kept, length in zip(filling.extents, filling.kept, stream.lengths, strict=True):
        for layer, new in zip(cached, (key, value), strict=True):
            place_HLD = layer.runs_of(extent, 1, kept + length)[0]
            place_HLD[:, kept:] = new[0, :, start : start + length]
        start += length


def _continued(
    q_HLD: Tensor,
    stream: PackedStream,
    number: int,
    cached: KeysValues,
    scale: float,
    sight: Sight,
    softcap: float | None,
) -> Tensor:
    """Return attention [L, H, D] of tokens that go on from what is kept of their sequence."""
    assert stream.filling is not None
    extent, kept = stream.filling.extents[number], stream.filling.kept[number]
    reach = kept + q_HLD.shape[1]
    groups = q_HLD.shape[0] // cached[0].heads
    k, v = (layer.runs_of(extent, 1, reach).repeat_interleave(groups, dim=1) for layer in cached)
    place = torch.arange(reach, device=q_HLD.device)
    mask = sight.seen(place[kept:, None], place)
    if softcap is not None:
        out = _softcapped(q_HLD[None], k, v, mask, scale, softcap)
    else:
        out = functional.scaled_dot_product_attention(
            q_HLD[None], k, v, attn_mask=mask, scale=scale
        )
    return out[0].transpose(0, 1)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: DecodeStep,
    layers: KeysValues,
    scale: float,
    sight: Sight,
    softcap: float | None,
) -> Tensor:
    """Attend from one new token of each sequence to what is kept of it; padding rows get zeros.

    A key-value head's query heads are taken as so many queries of it, so no key is repeated.
    """
    rows = step.rows
    count, heads = len(rows.extents), layers[0].heads
    for layer, new in zip(layers, (key, value), strict=True):
        new_SHD = new[0, :, :count].transpose(0, 1)
        new_SHD = new_SHD if rows.sorted else new_SHD[rows.order]
        layer.rows().index_copy_(0, step.places(heads), new_SHD.reshape(-1, layer.head_dim))
    q_SHGD = query[0, :, :count].transpose(0, 1).unflatten(1, (heads, -1))
    q_SHGD = q_SHGD.contiguous() if rows.sorted else q_SHGD[rows.order]
    if query.device.type == "cpu" or softcap is not None:
        out_SHGD = _decode_runs(q_SHGD, step, layers, scale, sight, softcap)
    else:
        out_SHGD = _decode_gathered(q_SHGD, step, layers, scale, sight)
    out_SHD = out_SHGD.flatten(1, 2)
    out_SHD = out_SHD if rows.sorted else out_SHD[rows.back]
    if query.shape[2] > count:
        padding = out_SHD.new_zeros(query.shape[2] - count, *out_SHD.shape[1:])
        out_SHD = torch.cat([out_SHD, padding])
    return out_SHD.unsqueeze(0)


def _decode_runs(
    q_SHGD: Tensor,
    step: DecodeStep,
    layers: KeysValues,
    scale: float,
    sight: Sight,
    softcap: float | None,
) -> Tensor:
    """Attend in place, one call for each run of extents; a sequence's bits are its own."""
    mask = step.mask(sight, q_SHGD.dtype)
    outputs = []
    for first, last in step.runs():
        # One sequence at a time under a softcap: a batched product's bits would depend on the run.
        size = 1 if softcap is not None else last - first
        for place in range(first, last, size):
            q, reach = q_SHGD[place : place + size], step.reach(place)
            k, v = (layer.runs_of(step.rows.extents[place], size, reach) for layer in layers)
            own_mask = mask[place : place + size, :, :, :reach]
            if softcap is not None:
                outputs.append(_softcapped(q, k, v, own_mask == 0.0, scale, softcap))
            else:
                outputs.append(_attend_apart(q, k, v, own_mask, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# So many queries have scores, sums and outputs of whole cache lines together.
WHOLE_LINES = 8


def _attend_apart(
    q_nHGD: Tensor, k_nHLD: Tensor, v_nHLD: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attend from few queries; a sequence's bits are its own with several threads, too.

    Each thread has a piece of one buffer, as long as its queries need, and the vendor's products
    may round otherwise where an operand does not begin on a cache line; so the queries are filled
    up to a number with which every piece does. A single problem would be taken by all threads.
    """
    count, heads, queries, _ = q_nHGD.shape
    if torch.get_num_threads() > 1:
        q_nHGD = functional.pad(q_nHGD, (0, 0, 0, -queries % WHOLE_LINES))
        if count * heads == 1:
            q_nHGD, k_nHLD, v_nHLD, mask = (
                t.expand(2, -1, -1, -1) for t in (q_nHGD, k_nHLD, v_nHLD, mask)
            )
    out_nHGD = functional.scaled_dot_product_attention(
        q_nHGD, k_nHLD, v_nHLD, attn_mask=mask, scale=scale
    )
    return out_nHGD[:count, :, :queries]


def _decode_gathered(
    q_SHGD: Tensor, step: DecodeStep, layers: KeysValues, scale: float, sight: Sight
) -> Tensor:
    """Attend for all sequences in one call, their keys and values copied side by side."""
    rows, longest, device = step.rows, step.longest(), q_SHGD.device
    heads = layers[0].heads
    start_S, tokens_S = (torch.from_numpy(a).to(device) for a in (rows.start_S, rows.tokens_S))
    first_SH = start_S[:, None] * heads + tokens_S[:, None] * torch.arange(heads, device=device)
    within_SL = torch.arange(longest, device=device).minimum(tokens_S[:, None] - 1)
    place = (first_SH[:, :, None] + within_SL[:, None, :]).reshape(-1)
    k, v = (
        layer.rows().index_select(0, place).view(len(rows.extents), heads, longest, -1)
        for layer in layers
    )
    return functional.scaled_dot_product_attention(
        q_SHGD, k, v, attn_mask=step.mask(sight, q_SHGD.dtype), scale=scale
    )


def _varlen_serves(query: Tensor, sight: Sight, softcap: float | None) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and softcap is None and sight.chunk is None


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
    both = cu_seqlens, cu_seqlens, longest, longest
    out_THD = varlen_attn(q_THD, k_THD, v_THD, *both, scale=scale, window_size=(left, 0))
    assert isinstance(out_THD, Tensor)
    return out_THD.unsqueeze(0)


AttentionInterface.register(NAME, packed_attention)
