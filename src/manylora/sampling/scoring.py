"""The model scores a prompt's own tokens, and names the likeliest tokens of a place.

M tokens of the prompt, c rows of a chunk, V vocabulary, k likeliest tokens, C candidates.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from manylora.models.stream import ROW_MULTIPLE, padded_rows
from manylora.sampling.request import Request
from manylora.types import PromptScores, TopK
from manylora.types.data import Array

# Logits of a chunk of rows: at most this many elements (16 MiB in fp32).
LOGITS_ELEMENTS = 1 << 22
# What stands where nothing was asked.
NO_TOKEN, NO_LOGPROB = 0, -99999.0


def logits_rows(vocab: int) -> int:
    """Return how many rows' logits may exist at a time."""
    return max(ROW_MULTIPLE, LOGITS_ELEMENTS // vocab // ROW_MULTIPLE * ROW_MULTIPLE)


class PromptScorer:
    """A scorer collects the scores of one prompt, in whatever pieces its hidden states come."""

    def __init__(self, request: Request):
        scoring, count = request.scoring, len(request.prompt)
        self._prompt = request.prompt
        self._scoring = scoring
        last = count if scoring.prompt_last_n is None else scoring.prompt_last_n
        # Tokens from here on are scored; the first one never is, because nothing predicts it.
        self._first = max(1, count - last) if scoring.prompt or scoring.topk_prompt else count
        self._logprobs_M = np.full(count, np.nan, np.float32)
        self._topk: TopK | None = None
        if scoring.topk_prompt:
            shape = (count, scoring.topk_prompt)
            self._topk = TopK(
                np.full(shape, NO_TOKEN, np.int32), np.full(shape, NO_LOGPROB, np.float32)
            )
        self._candidates: Array | None = None
        if scoring.candidates is not None:
            self._candidates = np.full(scoring.candidates.shape, np.nan, np.float32)
        self.finite = True

    def take(
        self, first: int, hidden_LH: Tensor, head: Callable[[Tensor], Tensor], rows: int
    ) -> None:
        """Score what the hidden states of tokens `first`, `first` + 1, … predict, so many rows at a
        time; `head` gives logits [c, V] of hidden states [c, H] of a safe number of rows."""
        begin = 1 if self._candidates is not None else self._first
        stop = min(first + len(hidden_LH), len(self._prompt) - 1)
        for start in range(max(first, begin - 1), stop, rows):
            end = min(start + rows, stop)
            self._take_chunk(start + 1, hidden_LH[start - first : end - first], head)

    def scores(self) -> PromptScores:
        """Return the scores, after the last piece."""
        return PromptScores(self._logprobs_M, self._topk, self._candidates)

    def _take_chunk(self, token: int, hidden_cH: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Score the tokens from number `token` on."""
        count, missing = len(hidden_cH), padded_rows(len(hidden_cH)) - len(hidden_cH)
        logits_cV = head(torch.cat([hidden_cH, hidden_cH.new_zeros(missing, hidden_cH.shape[1])]))
        logprobs_cV = torch.log_softmax(logits_cV, dim=-1)[:count]
        self.finite &= bool(logprobs_cV[:, 0].isfinite().all())
        places = slice(token, token + count)
        # Of this chunk, the rows from here on are scored.
        skipped = min(max(self._first - token, 0), count)
        scored = slice(token + skipped, token + count)
        if self._scoring.prompt:
            targets_c1 = torch.from_numpy(self._prompt[places])[:, None].to(logprobs_cV.device)
            picked_c = logprobs_cV.gather(1, targets_c1)[skipped:, 0]
            self._logprobs_M[scored] = picked_c.cpu().numpy()
        if self._topk is not None:
            best = likeliest(logprobs_cV[skipped:], self._scoring.topk_prompt)
            self._topk.tokens[scored], self._topk.logprobs[scored] = best.tokens, best.logprobs
        asked = self._scoring.candidates
        if self._candidates is not None and asked is not None:
            asked_cC = asked[token - 1 : token - 1 + count]
            index_cC = torch.from_numpy(np.maximum(asked_cC, 0)).to(logprobs_cV.device)
            found_cC = logprobs_cV.gather(1, index_cC).cpu().numpy()
            found_cC[asked_cC < 0] = np.nan
            self._candidates[token - 1 : token - 1 + count] = found_cC


def likeliest(logprobs_cV: Tensor, k: int) -> TopK:
    """Return the k likeliest tokens of each row, best first; of equally likely ones the first."""
    values_ck, tokens_ck = logprobs_cV.topk(k, dim=-1)
    return TopK(tokens_ck.int().cpu().numpy(), values_ck.cpu().numpy())


def joined(parts: list[TopK], k: int) -> TopK:
    """Join places of one sequence, none or several, each with its k likeliest tokens, into one."""
    if not parts:
        return TopK(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
    return TopK(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
    )
