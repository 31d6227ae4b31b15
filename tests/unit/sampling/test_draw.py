"""Choosing tokens, against a loop over rows and tokens in plain Python. S rows, V vocabulary."""

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from manylora.kernels import RowCounts
from manylora.sampling.draw import RowSettings, choose, stream_key, uniforms
from manylora.types.data import Array

pytestmark = pytest.mark.usefixtures("threads")
VOCAB = 50


def run(logits_SV: Array, temperature: Array, top_k: Array, top_p: Array, draws: Array):
    count, vocab = logits_SV.shape
    rows = RowCounts((), 16)
    logits_TV = torch.zeros(rows.holding(count), vocab)
    logits_TV[:count] = torch.from_numpy(logits_SV)
    settings = RowSettings(
        temperature.astype(np.float32), top_k, top_p, rows, vocab, torch.device("cpu")
    )
    return choose(logits_TV, settings, draws)


def by_hand(logits_V: Array, temperature: float, top_k: int, top_p: float, draw: float):
    """The token and its log-probability."""
    scale = temperature or 1.0
    scaled = [float(x) / scale for x in logits_V]
    norm = math.log(math.fsum(math.exp(x - max(scaled)) for x in scaled)) + max(scaled)
    probs = [math.exp(x - norm) for x in scaled]
    if temperature == 0.0:
        token = int(np.argmax(logits_V))
        return token, scaled[token] - norm
    order = range(len(probs))
    if top_k or top_p < 1.0:
        order = sorted(order, key=lambda t: -probs[t])
        kept, before = [], 0.0
        for rank, token in enumerate(order):
            if (top_k and rank >= top_k) or (rank and before >= top_p):
                break
            kept.append(token)
            before += probs[token]
        order = kept
    target, sum_ = draw * math.fsum(probs[t] for t in order), 0.0
    for token in order:
        sum_ += probs[token]
        if sum_ > target:
            break
    return token, scaled[token] - norm


def test_every_row_is_chosen_by_its_own_settings():
    rng = np.random.default_rng(0)
    for count in (1, 7, 16, 40):
        logits_SV = rng.normal(0, 2, (count, VOCAB)).astype(np.float32)
        temperature = rng.choice([0.0, 0.3, 1.0, 2.0], count)
        top_k, top_p = rng.choice([0, 1, 3, 100], count), rng.choice([1.0, 0.9, 0.3, 1e-9], count)
        draws = rng.random(count)
        choice = run(logits_SV, temperature, top_k, top_p, draws)
        for s in range(count):
            token, logprob = by_hand(
                logits_SV[s], temperature[s], int(top_k[s]), top_p[s], draws[s]
            )
            assert choice.tokens_S[s] == token
            assert choice.logprobs_S[s] == pytest.approx(logprob, abs=1e-5)


def test_a_row_has_the_bits_that_it_has_alone():
    rng = np.random.default_rng(1)
    for vocab in (VOCAB, 2816):
        logits_SV = rng.normal(0, 3, (70, vocab)).astype(np.float32)
        temperature = rng.choice([0.0, 0.7, 1.0], 70)
        top_k, top_p = rng.choice([0, 5], 70), rng.choice([1.0, 0.8], 70)
        draws = rng.random(70)
        whole = run(logits_SV, temperature, top_k, top_p, draws)
        for rows in ([3], [69, 0, 5], list(range(20, 60))):
            part = run(logits_SV[rows], *(a[rows] for a in (temperature, top_k, top_p, draws)))
            assert (part.tokens_S == whole.tokens_S[rows]).all()
            assert (part.logprobs_S == whole.logprobs_S[rows]).all()


def test_what_has_no_weight_is_never_drawn():
    logits_SV = np.full((4, VOCAB), -np.inf, np.float32)
    logits_SV[:, [10, 20]] = 0.0
    ones, zeros = np.ones(4), np.zeros(4, np.int64)
    for top_p in (1.0, 0.99):
        draws = np.array([0.0, 0.4999, 0.5, 1.0 - 2.0**-52])
        choice = run(logits_SV, ones, zeros, np.full(4, top_p), draws)
        assert choice.tokens_S.tolist() == [10, 10, 20, 20]


def test_a_temperature_near_zero_is_greedy():
    logits_SV = np.random.default_rng(2).normal(size=(3, VOCAB)).astype(np.float32)
    cold = run(logits_SV, np.full(3, 1e-30), np.zeros(3, np.int64), np.ones(3), np.full(3, 0.99))
    assert (cold.tokens_S == logits_SV.argmax(axis=1)).all()
    assert (cold.logprobs_S == 0.0).all()


def test_random_numbers_are_even_and_streams_apart():
    keys = np.array([stream_key(seed, 0, sample) for seed in range(40) for sample in range(5)])
    assert len(set(keys.tolist())) == len(keys)
    keys = keys.astype(np.uint64)
    numbers = np.stack([uniforms(keys, np.full(len(keys), place)) for place in range(500)])
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / numbers.size) ** 0.5
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    expected = numbers.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # p = 0.001 at 19
    for one in (np.corrcoef(numbers.T), np.corrcoef(numbers)):  # between streams, between places
        off = one[~np.eye(len(one), dtype=bool)]
        assert abs(off).max() < 0.45 and abs(off.mean()) < 0.01


def test_streams_depend_on_every_number():
    assert (
        len({stream_key(s, p, n) for s in (0, 1, -1, 2**63) for p in (0, 1) for n in (0, 1)}) == 16
    )
    assert stream_key(1, 0, 2) != stream_key(0, 1, 2) != stream_key(2, 1, 0)


@pytest.mark.parametrize("equal", [1, 2, 4, 8, 16])
def test_top_p_ends_where_the_sum_is_reached_exactly(equal: int):
    """Against transformers, at shares that are exact in binary: so many equal tokens, the rest
    without weight."""
    logits_1V = np.full((1, VOCAB), -1e4, np.float32)
    logits_1V[0, :equal] = 0.0
    zero = np.zeros(1, np.int64)
    for kept in range(1, equal):
        share = kept / equal
        warped = TopPLogitsWarper(share)(None, torch.from_numpy(logits_1V))  # type: ignore[arg-type]
        expected = int(torch.isfinite(warped).sum())
        draws = (np.arange(4 * equal) + 0.5) / (4 * equal)
        tokens = {
            int(run(logits_1V, np.ones(1), zero, np.array([share]), draws[i : i + 1]).tokens_S[0])
            for i in range(len(draws))
        }
        assert len(tokens) == expected == kept
