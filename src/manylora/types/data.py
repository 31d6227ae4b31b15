"""Training data as the engine takes it, and what it gives back.

Shapes: N tokens of one datum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manylora.types.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence and what its loss needs.

    Attributes:
        tokens: int64 [N], what the model reads.
        loss_inputs: one array [N] each; position i belongs to the prediction made *at* token i.
            `target_tokens` (int64) is always there: the token that position i should predict.
            `cross_entropy` takes `weights` (any sign); the policy-gradient losses take
            `logprobs` (of the sampling policy) and `advantages`.
    """

    tokens: Array
    loss_inputs: Mapping[str, Array]

    def __post_init__(self) -> None:
        tokens = np.ascontiguousarray(self.tokens)
        if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
            raise DataError(
                "tokens must be a non-empty one-dimensional integer array, "
                f"not {tokens.dtype} {tokens.shape}"
            )
        object.__setattr__(self, "tokens", tokens.astype(np.int64, copy=False))
        inputs: dict[str, Array] = {}
        for name, value in self.loss_inputs.items():
            array = np.ascontiguousarray(value)
            if array.shape != tokens.shape:
                raise DataError(
                    f"loss input {name!r} has shape {array.shape}; tokens have {tokens.shape}"
                )
            inputs[name] = array.astype(
                np.int64 if name == "target_tokens" else np.float32, copy=False
            )
        if "target_tokens" not in inputs:
            raise DataError("loss input 'target_tokens' is missing")
        object.__setattr__(self, "loss_inputs", inputs)

    def __len__(self) -> int:
        return len(self.tokens)


def causal_datum(tokens: Sequence[int] | Array, weights: Sequence[float] | Array) -> Datum:
    """A cross-entropy datum from a whole sequence.

    Args:
        tokens: the M tokens of the sequence, M ≥ 2.
        weights: M numbers; `weights[i]` is the weight of predicting `tokens[i]`. The first
            token is predicted by nothing, so its weight is not used.

    Returns:
        A datum of M - 1 positions: inputs `tokens[:-1]`, targets `tokens[1:]`.
    """
    tokens_M, weights_M = np.asarray(tokens, dtype=np.int64), np.asarray(weights, dtype=np.float32)
    if len(tokens_M) < 2 or tokens_M.shape != weights_M.shape:
        raise DataError(
            "a sequence needs two tokens or more and one weight each; "
            f"got {len(tokens_M)} and {len(weights_M)}"
        )
    return Datum(tokens_M[:-1], {"target_tokens": tokens_M[1:], "weights": weights_M[1:]})


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """What `forward_backward` and `forward` give back for one operation.

    Attributes:
        logprobs: per datum float32 [N], log p(target) at temperature 1.
        loss: sum of the per-token losses over all tokens and data.
        metrics: further figures, named `name:reduction`; `loss:sum` is always there.
    """

    logprobs: tuple[Array, ...]
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimStepResult:
    """What `optim_step` gives back.

    Attributes:
        step: number of optimizer steps that this adapter has made, this one included.
        grad_norm: L2 norm of the gradient before clipping.
    """

    step: int
    grad_norm: float
