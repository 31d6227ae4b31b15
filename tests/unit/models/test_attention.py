"""Packed attention against transformers' own eager forward, one sequence at a time.

T tokens of the stream, H hidden size, V vocabulary.
"""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from manylora.models import BaseModel, KVCache, PackedStream, attention, open_base, packed
from manylora.models.cache import DecodeRows, DecodeStep, Extent, Filling
from manylora.models.sight import Sight, make_sight
from manylora.models.stream import padded_rows
from manylora.types import Unsupported
from tests.models import FAMILIES, ODD, VOCAB

pytestmark = pytest.mark.usefixtures("threads")
RUNS = attention._decode_runs
CLOSE = {"rtol": 0, "atol": 5e-5}  # fp32 sums in another order, logits of the size of 1


def sequences(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def streamed(base: BaseModel, tokens: list[Tensor], filling: Filling | None = None) -> list[Tensor]:
    """Hidden states of each sequence, all in one packed stream."""
    lengths = [len(t) for t in tokens]
    kept = [0] * len(tokens) if filling is None else filling.kept
    total = padded_rows(sum(lengths))
    tokens_T, positions_T = torch.zeros(2, total, dtype=torch.long)
    tokens_T[: sum(lengths)] = torch.cat(tokens)
    positions_T[: sum(lengths)] = torch.cat(
        [torch.arange(k, k + n) for k, n in zip(kept, lengths, strict=True)]
    )
    with packed(PackedStream(lengths, total, filling=filling)):
        hidden_TH = base.hidden(tokens_T, positions_T)
    return list(hidden_TH[: sum(lengths)].split(lengths))


@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
@torch.no_grad()
def test_a_packed_stream_gives_each_sequences_own_logits(tiny, family: str):
    """Longer than the window, equal lengths side by side, single tokens; grouped heads."""
    base = open_base(tiny(family))
    stock = AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation="eager").eval()
    tokens = sequences([30, 12, 12, 12, 1, 1, 5, 30])
    for own, hidden in zip(tokens, streamed(base, tokens), strict=True):
        expected = stock(input_ids=own[None], use_cache=False).logits[0]
        torch.testing.assert_close(base.logits(hidden), expected, **CLOSE)


@pytest.mark.parametrize("family", [*FAMILIES, "diffllama", "cohere2"])
@torch.no_grad()
def test_neighbours_do_not_change_a_bit(tiny, family: str):
    """Alone, or in a run of equal lengths, at its beginning or its end."""
    base = open_base(tiny(family))
    (mine,) = sequences([13], seed=1)
    others = sequences([13, 13, 4, 13, 40], seed=2)
    alone = streamed(base, [mine])[0]
    for place in range(len(others) + 1):
        found = streamed(base, [*others[:place], mine, *others[place:]])[place]
        assert torch.equal(found, alone), place


def room(cache: KVCache, tokens: int) -> Extent:
    extent = cache.allocate(tokens)
    assert extent is not None
    return extent


def decoded(base: BaseModel, cache: KVCache, extents: list[Extent], tokens, places) -> Tensor:
    """Hidden states [S, H] of one new token of each sequence."""
    count, total = len(extents), padded_rows(len(extents))
    tokens_T, positions_T = torch.zeros(2, total, dtype=torch.long)
    tokens_T[:count], positions_T[:count] = torch.tensor(tokens), torch.tensor(places)
    step = DecodeStep(DecodeRows(cache, extents, base.device), np.array(places))
    with packed(PackedStream([1] * count, total, decoding=step)):
        return base.hidden(tokens_T, positions_T)[:count]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
@torch.no_grad()
def test_decoding_from_the_cache_is_the_full_forward(
    tiny, family: str, gathered: bool, monkeypatch: pytest.MonkeyPatch
):
    """Prompts read in pieces, of different lengths, then token by token past window and block;
    extents in another order than the stream; one leaves on the way and another takes its place."""
    if gathered:  # what other devices do
        monkeypatch.setattr(attention, "_decode_runs", gathered_runs)
    base = open_base(tiny(family))
    whole = sequences([100, 90, 70, 100], seed=3)
    prompts = [61, 1, 40, 61]
    full = streamed(base, whole)
    cache = KVCache(512)
    extents = [room(cache, 128) for _ in whole][::-1]
    at = [0] * 4
    for piece in (1, 7, 53):
        reading = [i for i in range(4) if at[i] < prompts[i]]
        parts = [whole[i][at[i] : min(at[i] + piece, prompts[i])] for i in reading]
        filling = Filling(cache, [extents[i] for i in reading], [at[i] for i in reading])
        for i, found in zip(reading, streamed(base, parts, filling), strict=True):
            expected = full[i][at[i] : at[i] + len(found)]
            torch.testing.assert_close(found, expected, **CLOSE)
            at[i] += len(found)
    for _ in range(40):
        going = [i for i in range(4) if at[i] < len(whole[i])]
        hidden_SH = decoded(
            base,
            cache,
            [extents[i] for i in going],
            [int(whole[i][at[i]]) for i in going],
            [at[i] for i in going],
        )
        for i, found_H in zip(going, hidden_SH, strict=True):
            torch.testing.assert_close(found_H, full[i][at[i]], **CLOSE)
            at[i] += 1


def odd(**shape: Any) -> dict[str, Any]:
    return shape


def gathered_runs(q_SHGD, step, layers, scale, window, softcap) -> Tensor:
    if softcap is not None:
        return RUNS(q_SHGD, step, layers, scale, window, softcap)
    return attention._decode_gathered(q_SHGD, step, layers, scale, window)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        *((family, {}) for family in FAMILIES),
        (
            "llama",
            {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 20},
        ),
        (
            "llama",
            {"hidden_size": 75, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12},
        ),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_who_else_decodes_does_not_change_a_bit(
    tiny, family: str, shape: dict[str, Any], dtype: str
):
    """Random neighbours, adjacent or not, shorter and longer than mine and than 512 tokens."""
    base = open_base(tiny(family, max_position_embeddings=2048, **shape), dtype=dtype)
    rng = np.random.default_rng(0)
    for place in (0, 62, 63, 64, 200, 511, 512, 700, 1100):
        outcomes = []
        for crowd in (0, 1, 5, 40):
            cache = KVCache(1 << 17)
            others = [int(n) for n in rng.integers(0, 1200, crowd)]
            others[: crowd // 2] = [place] * (crowd // 2)  # runs of equal reach
            mine = int(rng.integers(0, crowd + 1))
            places = [*others[:mine], place, *others[mine:]]
            # Adjacent extents of one size in an order of their own, or each as long as it needs.
            order = rng.permutation(len(places)).tolist()
            sizes = [1280 if crowd % 2 else n + 2 for n in places]
            made = {i: room(cache, sizes[i]) for i in order}
            extents = [made[i] for i in range(len(places))]
            if place:
                filling = Filling(cache, [extents[mine]], [0])
                streamed(base, [torch.arange(place) % VOCAB], filling)
            tokens = [7 if i == mine else int(rng.integers(VOCAB)) for i in range(len(places))]
            outcomes.append(decoded(base, cache, extents, tokens, places)[mine])
        for found_H in outcomes[1:]:
            assert torch.equal(found_H, outcomes[0]), place


def test_what_attention_is_asked_for_and_does_not_do_is_refused():
    layer, attend = torch.nn.Identity(), cast(Any, attention.packed_attention)
    q = torch.zeros(1, 4, 32, 16)
    for asked in (
        {"s_aux": torch.zeros(4)},
        {"position_bias": q},
        {"dropout": 0.1},
        {"is_causal": False},
        {"output_attentions": True},
    ):
        with packed(PackedStream([3], 32)), pytest.raises(Unsupported, match=next(iter(asked))):
            attend(layer, q, q, q, None, **asked)
    with packed(PackedStream([3], 32)):  # what says nothing
        attention.packed_attention(
            layer, q, q, q, None, s_aux=None, position_ids=q, use_cache=False
        )
        with pytest.raises(Unsupported, match="mask of its own"):
            attend(layer, q, q, q, torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("masks", "size", "sight"),
    [
        ((causal_mask_function,), None, Sight()),
        ((sliding_window_causal_mask_function(5),), 5, Sight(window=5)),
        ((chunked_causal_mask_function(4, torch.zeros(1)),), 4, Sight(chunk=4)),
        ((bidirectional_mask_function,), None, None),
        ((causal_mask_function, lambda *_: torch.tensor(True)), None, None),
        ((sliding_window_causal_mask_function(5),), None, None),
    ],
)
def test_a_mask_is_understood_or_refused(masks, size, sight):
    function = and_masks(*masks, packed_sequence_mask_function(torch.zeros(1, 9)))
    if sight is None:
        with pytest.raises(Unsupported, match="attention mask"):
            make_sight(mask_function=function, local_size=size)
    else:
        assert make_sight(mask_function=function, local_size=size) == sight


def test_runs_and_boundaries():
    stream = PackedStream([3, 3, 1, 3], 32)
    assert stream.runs() == [(2, 3), (1, 1), (1, 3)]
    assert stream.num_padding == 22
    assert stream.cu_seqlens(torch.device("cpu")).tolist() == [0, 3, 6, 7, 10, 32]
    assert PackedStream([32], 32).cu_seqlens(torch.device("cpu")).tolist() == [0, 32]
    assert [padded_rows(n) for n in (1, 32, 33)] == [32, 32, 64]


def test_one_stream_at_a_time():
    stream = PackedStream([1], 32)
    with packed(stream), pytest.raises(AssertionError, match="already running"), packed(stream):
        pass
    with packed(stream):
        pass
