"""Packs tokenised documents into rows in which documents do not see each other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from generate import documents
from transformers import PreTrainedTokenizerBase

POOL = 512
IGNORED = -100


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, seed: int, row: int, mixture: str
) -> Iterator[list[int]]:
    """Endless documents as token ids, each with its end-of-text token, none above a row."""
    stream = documents(seed, mixture)
    while True:
        for ids in tokenizer(list(islice(stream, 4096)))["input_ids"]:
            if len(ids) < row:
                yield [*ids, tokenizer.eos_token_id]


def _rows(
    tokenizer: PreTrainedTokenizerBase, seed: int, row: int, mixture: str
) -> Iterator[list[list[int]]]:
    """Lists of documents that together fill a row nearly or fully."""
    stream = _tokenised(tokenizer, seed, row, mixture)
    pool = list(islice(stream, POOL))
    while True:
        chosen: list[list[int]] = []
        free = row
        # The pool keeps its order, so long documents get their turn as they grow old.
        for i in range(len(pool)):
            if len(pool[i]) <= free:
                chosen.append(pool[i])
                free -= len(pool[i])
                pool[i] = next(stream)
                if free < 5:
                    break
        yield chosen


def batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, rows: int, row: int, mixture: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of ids, positions, labels (already shifted) and a block-causal mask."""
    stream = _rows(tokenizer, seed, row, mixture)
    causal = torch.ones(row, row, dtype=torch.bool).tril()
    while True:
        ids = torch.full((rows, row), tokenizer.eos_token_id)
        labels = torch.full((rows, row), IGNORED)
        positions = torch.zeros(rows, row, dtype=torch.long)
        part = torch.zeros(rows, row, dtype=torch.long)
        for r, docs in enumerate(islice(stream, rows)):
            at = 0
            for number, doc in enumerate(docs, start=1):
                end = at + len(doc)
                ids[r, at:end] = torch.tensor(doc)
                labels[r, at : end - 1] = ids[r, at + 1 : end]
                positions[r, at:end] = torch.arange(len(doc))
                part[r, at:end] = number
                at = end
        mask = (part[:, :, None] == part[:, None, :]) & causal
        yield {"ids": ids, "labels": labels, "positions": positions, "mask": mask[:, None]}
