"""A trial runs a base as we do: many sequences in a stream, and on from what is kept.

It is tried on the base's twin, with sequences that are longer than its windows, and in fp64: there
rounding is far smaller than anything that is wrong.

V vocabulary.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from manylora.models.agreement import logit_factor, relative_error, stock_logits, streamed_logits
from manylora.models.base import BaseModel, find_backbone, find_head
from manylora.models.cache import BLOCK, DecodeRows, DecodeStep, Filling, KVCache
from manylora.models.fully_sharded import Shared
from manylora.models.stream import PackedStream, padded_rows
from manylora.models.twin import WINDOW, make_twin
from manylora.parallel import Mesh
from manylora.types import ManyloraError, Unsupported
from manylora.types.mesh_shape import MeshShape

# Tokens of the sequences: past the windows and a block of the cache, past the windows, not so.
LENGTHS = (BLOCK + 6, WINDOW + 5, WINDOW)
# How they are fed to be continued: so many tokens of each at a time. Ones are decoded.
ROUNDS = ((40, 5, 0), (22, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 2), *((1, 1, 1),) * 6)
# Relative to the largest logit.
TOLERANCE = 1e-6

# What was found of a config on a device; a process may open a base many times.
_found: dict[tuple[str, int, str], str | None] = {}


class Precise(TorchFunctionMode):
    """Code that asks for fp32 gets fp64: models go there for norms, rotations and probabilities."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_precise(value) for value in args)
        return func(*args, **{name: _precise(value) for name, value in (kwargs or {}).items()})


def _precise(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def try_twin(name: str, config: Any, context_length: int, device: torch.device) -> None:
    """Try our way of running a base on its twin, once for each config. Raises Unsupported: a
    stream, or going on from kept keys and values, gives other logits than each sequence alone; or
    there can be no twin."""
    text = json.dumps(config.to_dict(), default=str, sort_keys=True)
    key = (text, context_length, str(device))
    if key not in _found:
        with Precise():
            _found[key] = _fault(config, context_length, device)
    fault = _found[key]
    if fault is not None:
        raise Unsupported(f"base {name!r} ({config.model_type}) is not supported: {fault}")


@torch.no_grad()
def _fault(config: Any, context_length: int, device: torch.device) -> str | None:
    try:
        twin = _as_base(make_twin(config, device), context_length, device)
        generator = torch.Generator().manual_seed(1)
        sequences = [
            torch.randint(1, twin.vocab_size, (min(n, context_length),), generator=generator)
            for n in LENGTHS
        ]
        sequences = [tokens.to(device) for tokens in sequences]
        stock = stock_logits(twin, sequences)
        twin.head.factor = logit_factor(twin, sequences[-1], stock[-1])
        # Two of one length side by side are one call of attention.
        streamed = streamed_logits(twin, [sequences[1], *sequences])
        error = relative_error(streamed, [stock[1], *stock])
        if not error <= TOLERANCE:
            return (
                "in a packed stream it gives other logits than for each sequence alone (relative "
                f"difference {error:.1e}, tried on a small model of its config)"
            )
        error = relative_error(_continued(twin, sequences), stock)
    except ManyloraError as refusal:
        return str(refusal)
    except Exception as failure:
        return f"a small model of its config does not run ({type(failure).__name__}: {failure})"
    if not error <= TOLERANCE:
        return (
            "token by token, from kept keys and values, it gives other logits than for the whole "
            f"sequence (relative difference {error:.1e}, tried on a small model of its config)"
        )
    return None


def _as_base(model: Any, context_length: int, device: torch.device) -> BaseModel:
    head = find_head(model, None, Shared())
    return BaseModel(
        name="",
        folder="",
        model=model,
        backbone=find_backbone(model),
        head=head,
        tokenizer=None,
        context_length=context_length,
        eos_token_ids=(),
        vocab_size=head.vocab,
        device=device,
        dtype=torch.float64,
        fingerprint="",
        mesh=Mesh(MeshShape(), 0, None),
    )


def _continued(base: BaseModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Return logits [tokens, V] of each sequence, read in pieces and then token by token."""
    cache = KVCache(2 * BLOCK * len(sequences))
    # In another order than the stream's.
    extents = [cache.allocate(2 * BLOCK) for _ in sequences][::-1]
    at = [0] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    for counts in ROUNDS:
        fed = [
            (number, sequences[number][at[number] : at[number] + count])
            for number, count in enumerate(counts)
            if count and at[number] < len(sequences[number])
        ]
        if not fed:
            continue
        own = [extent for number, _ in fed if (extent := extents[number]) is not None]
        kept = [at[number] for number, _ in fed]
        lengths = [len(tokens) for _, tokens in fed]
        total = padded_rows(sum(lengths))
        stream = PackedStream(lengths, total)
        if max(counts) == 1:
            stream.decoding = DecodeStep(DecodeRows(cache, own, base.device), np.array(kept))
        else:
            stream.filling = Filling(cache, own, kept)
        for (number, tokens), found in zip(
            fed, streamed_logits(base, [tokens for _, tokens in fed], stream), strict=True
        ):
            logits[number].append(found)
            at[number] += len(tokens)
    return [torch.cat(parts) for parts in logits]
