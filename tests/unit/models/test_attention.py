"""Packed attention against transformers' own eager forward, one sequence at a time.

T tokens of the stream, H hidden size, V vocabulary.
"""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from manylora.models import BaseModel, KVCache, PackedStream, open_base, packed
from manylora.models.stream import padded_rows
from tests.models import FAMILIES, VOCAB

pytestmark = pytest.mark.usefixtures("threads")
CLOSE = {"rtol": 0, "atol": 5e-5}  # fp32 sums in another order, logits of the size of 1


def sequences(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def streamed(base: BaseModel, tokens: list[Tensor], cache: KVCache | None = None) -> list[Tensor]:
    """Hidden states of each sequence, all in one packed stream."""
    lengths = [len(t) for t in tokens]
    total = padded_rows(sum(lengths))
    tokens_T, positions_T = torch.zeros(2, total, dtype=torch.long)
    tokens_T[: sum(lengths)] = torch.cat(tokens)
    positions_T[: sum(lengths)] = torch.cat([torch.arange(n) for n in lengths])
    with packed(PackedStream(lengths, total, cache)):
        hidden_TH = base.hidden(tokens_T, positions_T)
    return list(hidden_TH[: sum(lengths)].split(lengths))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_packed_stream_gives_each_sequences_own_logits(tiny, family: str):
    """Longer than the window, equal lengths side by side, single tokens; grouped heads."""
    base = open_base(tiny(family))
    stock = AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation="eager").eval()
    tokens = sequences([30, 12, 12, 12, 1, 1, 5, 30])
    for own, hidden in zip(tokens, streamed(base, tokens), strict=True):
        expected = stock(input_ids=own[None], use_cache=False).logits[0]
        torch.testing.assert_close(base.logits(hidden), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_from_the_cache_is_the_full_forward(tiny, family: str):
    """Prompts of different lengths, token by token past the window; one leaves on the way."""
    base = open_base(tiny(family))
    whole = sequences([25, 20, 25], seed=3)
    prompts = [5, 1, 11]
    full = streamed(base, whole)
    cache = KVCache(3, 25)
    hidden = streamed(base, [t[:n] for t, n in zip(whole, prompts, strict=True)], cache)
    for found, expected in zip(hidden, full, strict=True):
        torch.testing.assert_close(found, expected[: len(found)], **CLOSE)
    rows = [0, 1, 2]
    for count in itertools.count():
        places = [prompts[row] + count for row in rows]
        staying = [i for i, row in enumerate(rows) if places[i] < len(whole[row])]
        if len(staying) < len(rows):
            cache.keep(torch.tensor(staying, dtype=torch.long))
            rows, places = [rows[i] for i in staying], [places[i] for i in staying]
        if not rows:
            break
        total = padded_rows(len(rows))
        tokens_T, positions_T = torch.zeros(2, total, dtype=torch.long)
        tokens_T[: len(rows)] = torch.stack(
            [whole[r][p] for r, p in zip(rows, places, strict=True)]
        )
        positions_T[: len(rows)] = torch.tensor(places)
        stream = PackedStream([1] * len(rows), total, cache, True, torch.tensor(places))
        with packed(stream):
            hidden_TH = base.hidden(tokens_T, positions_T)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            torch.testing.assert_close(hidden_TH[i], full[row][place], **CLOSE)


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
