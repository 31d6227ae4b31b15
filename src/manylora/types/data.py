"""The engine takes training data in these forms, and returns these results.

Shapes: N tokens of one datum, K targets of each position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manylora.types.errors import DataError

Array = np.ndarray[Any, Any]

# The inputs that may hold several numbers for each position, and how many at most.
SEVERAL_TARGETS = ("target_tokens", "weights")
MAX_TARGETS = 1024


@dataclass(frozen=True, slots=True)
class Datum:
    """A `Datum` is one sequence with what its loss needs.

    Attributes:
        tokens: int64 [N], what the model reads.
        loss_inputs: one array [N] each; position i belongs to the prediction made *at* token i.
            `target_tokens` (int64) is always there: the token that position i should predict.
            `cross_entropy` takes `weights` (any sign), and both may be [N, K]: K tokens that the
            position should predict, each with its weight. The policy-gradient losses take
            `logprobs` (of the sampling policy) and `advantages`; `gspo` a
            `sequence_ratio_mask` (0 or 1) as well. They may also take, together,
            `reference_logprobs` (of the reference policy, at the same temperature) and
            `kl_weights`: what the KL to it counts at each token.
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
            _check_input(name, array, len(tokens))
            with np.errstate(over="ignore"):  # an Inf is refused by the loss, with its place
                inputs[name] = array.astype(
                    np.int64 if name == "target_tokens" else np.float32, copy=False
                )
        if "target_tokens" not in inputs:
            raise DataError("loss input 'target_tokens' is missing")
        shapes = {name: inputs[name].shape for name in SEVERAL_TARGETS if name in inputs}
        if len(set(shapes.values())) > 1:
            raise DataError(
                f"loss input 'weights' has shape {shapes['weights']}; "
                f"'target_tokens' has {shapes['target_tokens']}"
            )
        object.__setattr__(self, "loss_inputs", inputs)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Each position has this many targets: K."""
        targets = self.loss_inputs["target_tokens"]
        return 1 if targets.ndim == 1 else targets.shape[1]


def _check_input(name: str, array: Array, length: int) -> None:
    several = name in SEVERAL_TARGETS and array.ndim == 2 and len(array) == length
    if array.shape != (length,) and not several:
        raise DataError(f"loss input {name!r} has shape {array.shape}; tokens have {(length,)}")
    if several and not 1 <= array.shape[1] <= MAX_TARGETS:
        raise DataError(
            f"loss input {name!r} has shape {array.shape}; a position has 1 to {MAX_TARGETS} "
            "targets"
        )
    if array.dtype.kind not in ("iu" if name == "target_tokens" else "biuf"):
        kind = "whole numbers" if name == "target_tokens" else "numbers"
        raise DataError(f"loss input {name!r} holds {array.dtype}, not {kind}")


def causal_datum(tokens: Sequence[int] | Array, weights: Sequence[float] | Array) -> Datum:
    """Make a cross-entropy datum of a whole sequence.

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
class DeviceTime:
    """A `DeviceTime` says what an operation cost, in seconds of the device.

    Attributes:
        batches: time of the batches (or slices of the decode loop) that it was part of.
        share: its own share of that time: by tokens, or by requests where they decode together.
            The sum over all operations is how long the device worked.
    """

    batches: float = 0.0
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """`forward_backward` and `forward` return a `ForwardBackwardResult` for each operation.

    Attributes:
        logprobs: per datum float32, log p(target) at the operation's temperature, of the shape of
            its `target_tokens`: [N] or [N, K]. If the operation wanted the trained positions only,
            there are no others: [n] or [n, K].
        loss: sum of the losses over all targets, tokens and data.
        metrics: further figures, named `name:reduction`; `loss:sum` is always there.
        positions: per datum int64 [n], the positions whose log-probabilities these are; None if
            they are those of all positions.
        device: what it cost; two results are compared without it.
        entropies: per datum float32, the entropy in nats of the distribution at each of the
            positions whose log-probabilities these are: [N] or [n]; None if it was not asked.
    """

    logprobs: tuple[Array, ...]
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    positions: tuple[Array, ...] | None = None
    device: DeviceTime = field(default=DeviceTime(), compare=False)
    entropies: tuple[Array, ...] | None = None


@dataclass(frozen=True, slots=True)
class OptimStepResult:
    """`optim_step` returns an `OptimStepResult`.

    Attributes:
        step: number of optimizer steps that this adapter has made, this one included.
        grad_norm: L2 norm of the gradient before clipping.
        device: what it cost; two results are compared without it.
    """

    step: int
    grad_norm: float
    device: DeviceTime = field(default=DeviceTime(), compare=False)
