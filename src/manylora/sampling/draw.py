"""The next token of every row is chosen greedily, or drawn with the row's own random numbers.

T rows with padding, S rows, V vocabulary. Every row's numbers depend on that row alone: all that
is computed over elements is computed for so many rows as keep their bits (see `sampling.rows`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from manylora.kernels import RowCounts
from manylora.models.stream import padded_rows
from manylora.types.data import Array

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1

# Numbers whose logarithms are taken together are a multiple of this.
LOG_ROWS = 64


def stream_key(*numbers: int) -> int:
    """Make the key of a random stream, a 64-bit hash of a few numbers."""
    state = GOLDEN
    for number in numbers:
        state = _mixed((state ^ (number & MASK)) + GOLDEN & MASK)
    return state


def uniforms(key_S: Array, place_S: Array) -> Array:
    """Return float64 [S] in [0, 1): number `place` of each stream (splitmix64).

    They have 52 bits, so that a draw times a sum stays below the sum.
    """
    state_S = key_S + (place_S.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    state_S = (state_S ^ (state_S >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state_S = (state_S ^ (state_S >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state_S ^= state_S >> np.uint64(31)
    return (state_S >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mixed(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


class RowSettings:
    """`RowSettings` are sampling parameters of S rows as tensors, for as long as the rows stay.

    `rows` says what T is, and how many rows are drawn at a time.
    """

    def __init__(
        self,
        temperature_S: Array,
        top_k_S: Array,
        top_p_S: Array,
        rows: RowCounts,
        vocab: int,
        device: torch.device,
    ):
        count = len(temperature_S)
        drawn_S = temperature_S > 0.0
        cut_S = drawn_S & ((top_k_S > 0) | (top_p_S < 1.0))
        scale_T = np.ones(rows.holding(count), np.float32)
        scale_T[:count][drawn_S] = temperature_S[drawn_S]
        # Dividing by one changes nothing.
        divide = bool((scale_T != 1.0).any())
        self.scale_T1 = torch.from_numpy(scale_T[:, None]).to(device) if divide else None
        self.plain = _Rows.of(drawn_S & ~cut_S, rows, device)
        self.cut = _Rows.of(cut_S, rows, device)
        if self.cut is not None:
            padded = self.cut.padded
            k_C1 = np.where(top_k_S > 0, top_k_S, vocab)[padded][:, None]
            self.top_k_C1 = torch.from_numpy(k_C1).to(device)
            self.top_p_C1 = torch.from_numpy(top_p_S[padded][:, None]).to(device)


@dataclass(slots=True)
class _Rows:
    """`_Rows` are some of the rows; `padded` repeats one of them up to a safe number."""

    numbers: Array
    padded: Array
    index: Tensor

    @classmethod
    def of(cls, chosen_S: Array, rows: RowCounts, device: torch.device) -> "_Rows | None":
        numbers = np.flatnonzero(chosen_S)
        if not len(numbers):
            return None
        missing = rows.holding(len(numbers)) - len(numbers)
        padded = np.concatenate([numbers, np.repeat(numbers[:1], missing)])
        return cls(numbers, padded, torch.from_numpy(padded).to(device))


@dataclass(slots=True)
class Choice:
    """A choice is the next token of every row.

    Attributes:
        tokens_S: int64.
        logprobs_S: float32, of the scaled, untruncated distribution.
        scaled_TV: log-probability + norm.
        norm_T1: the logarithm of the sum of exp(scaled).
    """

    tokens_S: Array
    logprobs_S: Array
    scaled_TV: Tensor
    norm_T1: Tensor


def choose(logits_TV: Tensor, settings: RowSettings, draw_S: Array) -> Choice:
    """Choose the next token of the first S rows by each row's next random number, float64; the
    logits are overwritten."""
    chosen_T = logits_TV.argmax(dim=-1)
    scaled_TV = logits_TV.sub_(logits_TV.amax(dim=-1, keepdim=True))
    if settings.scale_T1 is not None:
        scaled_TV.div_(settings.scale_T1)
    weight_TV = scaled_TV.exp()
    norm_T1 = _log(weight_TV.sum(dim=-1, keepdim=True))
    for rows, draw in ((settings.plain, _draw), (settings.cut, _draw_cut)):
        if rows is not None:
            draw_C1 = torch.from_numpy(draw_S[rows.padded][:, None]).to(logits_TV.device)
            source_TV = weight_TV if rows is settings.plain else scaled_TV
            own_C = draw(source_TV.index_select(0, rows.index), draw_C1, settings)
            chosen_T.index_copy_(0, rows.index, own_C)
    picked_T = (scaled_TV.gather(1, chosen_T.unsqueeze(1)) - norm_T1).squeeze(1)
    # One transfer for both; a token fits a double.
    both = torch.stack([chosen_T.double(), picked_T.double()]).cpu().numpy()[:, : len(draw_S)]
    return Choice(both[0].astype(np.int64), both[1].astype(np.float32), scaled_TV, norm_T1)


def _log(sum_T1: Tensor) -> Tensor:
    """Take the logarithm of a number for each row, filled up so that none is at a ragged end."""
    missing = padded_rows(len(sum_T1), LOG_ROWS) - len(sum_T1)
    return functional.pad(sum_T1, (0, 0, 0, missing), value=1.0).log_()[: len(sum_T1)]


def _draw(weight_CV: Tensor, draw_C1: Tensor, _: RowSettings) -> Tensor:
    cumulative_CV = weight_CV.cumsum(-1, dtype=torch.float64)
    return _place(cumulative_CV, draw_C1)


def _draw_cut(scaled_CV: Tensor, draw_C1: Tensor, settings: RowSettings) -> Tensor:
    """Draw after top-k and top-p."""
    values_CV, tokens_CV = scaled_CV.sort(dim=-1, descending=True, stable=True)
    weight_CV = values_CV.exp().double()
    cumulative_CV = weight_CV.cumsum(-1)
    rank_V = torch.arange(scaled_CV.shape[1], device=scaled_CV.device)
    reached_CV = cumulative_CV - weight_CV >= settings.top_p_C1 * cumulative_CV[:, -1:]
    out_CV = (rank_V >= settings.top_k_C1) | (reached_CV & (rank_V > 0))
    place_C = _place(weight_CV.masked_fill_(out_CV, 0.0).cumsum(-1), draw_C1)
    return tokens_CV.gather(1, place_C.unsqueeze(1)).squeeze(1)


def _place(cumulative_CV: Tensor, draw_C1: Tensor) -> Tensor:
    """Return the first token whose cumulative weight is above the draw's share of all."""
    place_C1 = torch.searchsorted(cumulative_CV, draw_C1 * cumulative_CV[:, -1:], right=True)
    return place_C1.squeeze(1).clamp_(max=cumulative_CV.shape[1] - 1)
