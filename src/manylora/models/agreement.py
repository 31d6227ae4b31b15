"""A base on packed streams must give the numbers that transformers gives.

T tokens, H hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manylora.models import attention
from manylora.models.base import BaseModel
from manylora.models.fully_sharded import forget_forward
from manylora.models.stream import PackedStream, packed, padded_rows
from manylora.types import Unsupported

# Fields of a config that multiply or divide a family's logits; which, the name does not tell.
LOGIT_FACTORS = (
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
)


@torch.no_grad()
def check_agreement(base: BaseModel) -> None:
    """Find the head's factor, then compare a packed stream with transformers' own forward.

    With the base's own values, and few tokens: `trial.try_twin` has long ones. Raises Unsupported:
    it gives other logits.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(base.vocab_size, (n,), generator=generator).to(base.device)
        for n in (5, 3)
        if n <= base.context_length
    ]
    stock = stock_logits(base, sequences)
    base.head.factor = logit_factor(base, sequences[0], stock[0])
    error = relative_error(streamed_logits(base, sequences), stock)
    tolerance = 1e-3 if base.dtype == torch.float32 else 0.1
    if not error <= tolerance:
        raise Unsupported(
            f"base {base.name!r} ({type(base.model).__name__}): a packed stream gives other logits "
            f"than the model alone (relative difference {error:.1e}); it is not supported"
        )


def stock_logits(base: BaseModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Return fp32 logits [T, V] of each sequence alone, by transformers' eager attention."""
    found = []
    with base.head.gathered(), _eager(base):
        for tokens in sequences:
            output = base.model(input_ids=tokens.unsqueeze(0), use_cache=False)
            forget_forward(base.backbone)
            found.append(base.joined(output.logits[0].float()))
    return found


def streamed_logits(
    base: BaseModel, sequences: Sequence[Tensor], stream: PackedStream | None = None
) -> list[Tensor]:
    """Return fp32 logits [T, V] of sequences, or of their next tokens, in one stream, which says
    where they lie and what of each is kept (None = nothing is)."""
    lengths = [len(tokens) for tokens in sequences]
    if stream is None:
        stream = PackedStream(lengths, padded_rows(sum(lengths)))
    kept = [stream.kept(number) for number in range(len(lengths))]
    if stream.decoding is not None:
        kept = stream.decoding.positions_S.tolist()
    tokens_T = torch.zeros(stream.total, dtype=torch.long, device=base.device)
    positions_T = torch.zeros_like(tokens_T)
    tokens_T[: sum(lengths)] = torch.cat(list(sequences))
    positions_T[: sum(lengths)] = torch.cat(
        [torch.arange(k, k + n, device=base.device) for k, n in zip(kept, lengths, strict=True)]
    )
    with packed(stream):
        hidden_TH = base.hidden(tokens_T, positions_T)
    return list(base.logits(hidden_TH)[: sum(lengths)].split(lengths))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest of the expected numbers."""
    largest = max(numbers.abs().max().item() for numbers in expected)
    errors = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) or not largest else max(errors) / largest


def logit_factor(base: BaseModel, tokens: Tensor, stock_TV: Tensor) -> float:
    """Return which of the factors that the config names, and 1, gives the stock logits."""
    config: Any = base.model.config.get_text_config()
    named = [getattr(config, field, None) for field in LOGIT_FACTORS]
    numbers = [float(value) for value in named if isinstance(value, int | float) and value]
    if not numbers:
        return 1.0
    with base.head.gathered(), _eager(base):
        output = base.backbone(input_ids=tokens.unsqueeze(0), use_cache=False)
        forget_forward(base.backbone)
        raw_TV = base.joined(base.head.layer(output.last_hidden_state[0]).float())
    errors: dict[float, float] = {}
    for factor in (1.0, *(f for number in numbers for f in (1.0 / number, number))):
        base.head.factor = factor
        errors[factor] = (base.head.scaled_(raw_TV.clone()) - stock_TV).abs().max().item()
    return min(errors, key=lambda factor: errors[factor])


@contextmanager
def _eager(base: BaseModel) -> Iterator[None]:
    """Have attention done as transformers does it, without a kernel of its own kind."""
    base.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.model.set_attn_implementation(attention.NAME)
