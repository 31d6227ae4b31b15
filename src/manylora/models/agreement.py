"""Whether a base on packed streams gives the numbers that transformers gives.

T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manylora.models import attention
from manylora.models.base import BaseModel
from manylora.models.gathering import forget_forward
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

    Raises:
        Unsupported: it gives other logits.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [n for n in (5, 3) if n <= base.context_length]
    sequences = [
        torch.randint(base.vocab_size, (n,), generator=generator).to(base.device) for n in lengths
    ]
    with base.head.gathered(), _eager(base):
        stock = [_stock(base, tokens) for tokens in sequences]
        base.head.factor = _logit_factor(base, sequences[0], stock[0])
    ours = _streamed(base, sequences)
    expected = torch.cat(stock)
    tolerance = 1e-3 if base.dtype == torch.float32 else 0.1
    error = ((ours - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()
    if not error <= tolerance:
        raise Unsupported(
            f"base {base.name!r} ({type(base.model).__name__}): a packed stream gives other logits "
            f"than the model alone (relative difference {error:.1e}); it is not supported"
        )


def _logit_factor(base: BaseModel, tokens: Tensor, stock_TV: Tensor) -> float:
    """Of the factors that the config names, and 1, the one that gives the stock logits."""
    config: Any = base.model.config.get_text_config()
    named = [getattr(config, field, None) for field in LOGIT_FACTORS]
    numbers = [float(value) for value in named if isinstance(value, int | float) and value]
    if not numbers:
        return 1.0
    output = base.backbone(input_ids=tokens.unsqueeze(0), use_cache=False)
    raw_TV = base.joined(base.head.layer(output.last_hidden_state[0]).float())
    forget_forward(base.backbone)
    errors: dict[float, float] = {}
    for factor in (1.0, *(f for number in numbers for f in (1.0 / number, number))):
        base.head.factor = factor
        errors[factor] = (base.head.scaled_(raw_TV.clone()) - stock_TV).abs().max().item()
    return min(errors, key=lambda factor: errors[factor])


@contextmanager
def _eager(base: BaseModel) -> Iterator[None]:
    """Attention as transformers does it, without a kernel of its own kind."""
    base.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.model.set_attn_implementation(attention.NAME)


def _stock(base: BaseModel, tokens: Tensor) -> Tensor:
    output = base.model(input_ids=tokens.unsqueeze(0), use_cache=False)
    forget_forward(base.backbone)
    return base.joined(output.logits[0].float())


def _streamed(base: BaseModel, sequences: Sequence[Tensor]) -> Tensor:
    lengths = [len(tokens) for tokens in sequences]
    total = padded_rows(sum(lengths))
    tokens_T = torch.zeros(total, dtype=torch.long, device=base.device)
    positions_T = torch.zeros_like(tokens_T)
    tokens_T[: sum(lengths)] = torch.cat(list(sequences))
    positions_T[: sum(lengths)] = torch.cat([torch.arange(n, device=base.device) for n in lengths])
    with packed(PackedStream(lengths, total)):
        return base.logits(base.hidden(tokens_T, positions_T))[: sum(lengths)]
