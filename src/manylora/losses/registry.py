"""The registry has the losses by name, with the inputs and settings each one takes.

T tokens, N tokens of a datum, K targets of each position.

Every loss is a plain sum over tokens and data (no mean, no normalisation): with
l = log p(target) at the operation's temperature, q the sampling policy's log-probability, A the
advantage and r = exp(l - q), a loss function returns each token's loss and its derivative by l.

The losses of policies can be held to a reference policy: with `reference_logprobs` and `kl_weights`
each token's loss gets kl_weights · k, k by the setting `kl_estimator` (see `losses.kl`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.losses.cispo import cispo
from manylora.losses.cross_entropy import cross_entropy
from manylora.losses.dro import dro
from manylora.losses.gspo import gspo, sequence_log_ratio
from manylora.losses.importance_sampling import importance_sampling
from manylora.losses.kl import ESTIMATORS, kl_to_reference
from manylora.losses.ppo import ppo
from manylora.types import DataError, Datum
from manylora.types.data import Array

Settings = Mapping[str, float]
LossFunction = Callable[[Tensor, Mapping[str, Tensor], Settings], tuple[Tensor, Tensor]]
SequenceFunction = Callable[[Tensor, Mapping[str, Tensor], Sequence[int]], Tensor]

POLICY_INPUTS = ("logprobs", "advantages")
# A datum brings both of these or neither.
REFERENCE_LOGPROBS, KL_WEIGHTS = "reference_logprobs", "kl_weights"
KL_ESTIMATOR, DEFAULT_ESTIMATOR = "kl_estimator", 3.0


@dataclass(frozen=True, slots=True)
class Loss:
    """A `Loss` is one loss, with what it takes.

    Attributes:
        name: as clients call it.
        inputs: per-token fp32 arrays that a datum brings beside `target_tokens`.
        function: (logprobs [T], inputs, settings) → (loss [T], d loss / d logprobs [T]).
        defaults: settings and their default values.
        required: settings that have no default.
        several: whether a datum may bring [N, K] targets and inputs; the function then sees them
            one by one.
        masks: inputs that are 0 or 1, and not 0 everywhere.
        sequence_inputs: inputs that `function` reads and the engine makes, once the
            log-probabilities of whole data are known: (logprobs [T], inputs, lengths of the
            data) → [T].
        trained_by: inputs of which one at least is not 0 where a position is trained; none = every
            position is.
        held: whether it can be held to a reference policy.
    """

    name: str
    inputs: tuple[str, ...]
    function: LossFunction
    defaults: Settings = field(default_factory=dict)
    required: tuple[str, ...] = ()
    several: bool = False
    masks: tuple[str, ...] = ()
    sequence_inputs: Mapping[str, SequenceFunction] = field(default_factory=dict)
    trained_by: tuple[str, ...] = ()
    held: bool = False

    @property
    def optional(self) -> tuple[str, ...]:
        """A datum may bring these inputs, all of them or none."""
        return (REFERENCE_LOGPROBS, KL_WEIGHTS) if self.held else ()

    def alone(self) -> "Loss":
        """Return the loss as it is without a reference policy, whose inputs it does not know."""
        return replace(self, held=False)

    def settings(self, config: Mapping[str, float] | None) -> Settings:
        """Return the complete settings. Raises DataError: one is unknown, missing or not a finite
        number."""
        given = dict(config or {})
        known = {*self.defaults, *self.required, *((KL_ESTIMATOR,) if self.held else ())}
        for name, value in given.items():
            if name not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise DataError(f"loss {self.name!r} has no setting {name!r}; it takes: {listed}")
            if not _is_finite_number(value):
                raise DataError(
                    f"setting {name!r} of loss {self.name!r} is {value!r}, not a finite number"
                )
        if self.held and given.get(KL_ESTIMATOR, DEFAULT_ESTIMATOR) not in ESTIMATORS:
            raise DataError(
                f"setting {KL_ESTIMATOR!r} of loss {self.name!r} is {given[KL_ESTIMATOR]!r}; it is "
                f"one of {', '.join(map(str, ESTIMATORS))}"
            )
        for name in self.required:
            if name not in given:
                raise DataError(f"loss {self.name!r} needs the setting {name!r}; it has no default")
        return {**self.defaults, **given}

    def check(self, datum: Datum) -> None:
        """Refuse a datum whose inputs are not this loss's. Raises DataError: an input is missing,
        unknown, of a shape that this loss does not take, or not finite; the message names it."""
        given = set(datum.loss_inputs) - {"target_tokens"}
        for name in self.inputs:
            if name not in given:
                raise DataError(
                    f"loss {self.name!r} needs the input {name!r}, one number per token"
                )
        for name in sorted(given - {*self.inputs, *self.optional}):
            takes = ", ".join(("target_tokens", *self.inputs, *self.optional))
            raise DataError(f"loss {self.name!r} has no input {name!r}; it takes: {takes}")
        brought = [name for name in self.optional if name in given]
        if len(brought) == 1:
            raise DataError(
                f"loss {self.name!r} takes {' and '.join(map(repr, self.optional))} together or "
                f"not at all; there is only {brought[0]!r}"
            )
        targets = datum.loss_inputs["target_tokens"]
        if targets.ndim > 1 and not self.several:
            raise DataError(
                f"loss {self.name!r} takes one target per token; 'target_tokens' has shape "
                f"{targets.shape}"
            )
        for name in (*self.inputs, *brought):
            self._check_numbers(name, datum.loss_inputs[name])

    def trained(self, datum: Datum) -> Array:
        """Return which positions [N] are trained: have a loss, or a part in the loss of others.

        The others' loss and its derivative are 0, whatever their log-probabilities.
        """
        trained_N = np.full(len(datum), not self.trained_by)
        by = [*self.trained_by, *((KL_WEIGHTS,) if KL_WEIGHTS in datum.loss_inputs else ())]
        for name in by:
            values = datum.loss_inputs[name] != 0
            trained_N |= values if values.ndim == 1 else values.any(axis=1)
        return trained_N

    def _check_numbers(self, name: str, values: Array) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            place = np.argwhere(~finite)[0].tolist()
            raise DataError(f"input {name!r} is not finite: {values[tuple(place)]} at {place}")
        if name in self.masks and not (((values == 0) | (values == 1)).all() and values.any()):
            raise DataError(
                f"input {name!r} of loss {self.name!r} must be 0 or 1 for each token, and 1 for "
                "at least one"
            )


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _held(function: LossFunction) -> LossFunction:
    """Add the KL to the reference where a token has a weight for it; the others keep their bits."""

    @wraps(function)
    def with_kl(
        logprobs_T: Tensor, inputs: Mapping[str, Tensor], settings: Settings
    ) -> tuple[Tensor, Tensor]:
        loss_T, slope_T = function(logprobs_T, inputs, settings)
        if KL_WEIGHTS not in inputs:
            return loss_T, slope_T
        weights_T, estimator = inputs[KL_WEIGHTS], settings.get(KL_ESTIMATOR, DEFAULT_ESTIMATOR)
        kl_T, by_l_T = kl_to_reference(logprobs_T, inputs[REFERENCE_LOGPROBS], estimator)
        held_T = weights_T != 0
        return (
            torch.where(held_T, loss_T + weights_T * kl_T, loss_T),
            torch.where(held_T, slope_T + weights_T * by_l_T, slope_T),
        )

    return with_kl


def _policy(
    name: str, function: LossFunction, defaults: Settings | None = None, **details: Any
) -> Loss:
    """Return a loss of policies, which can be held to a reference."""
    inputs = (*POLICY_INPUTS, *details.get("masks", ()))
    return Loss(name, inputs, _held(function), defaults or {}, held=True, **details)


_LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", ("weights",), cross_entropy, several=True, trained_by=("weights",)),
        _policy("importance_sampling", importance_sampling, trained_by=("advantages",)),
        _policy(
            "ppo",
            ppo,
            {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
            trained_by=("advantages",),
        ),
        _policy(
            "cispo",
            cispo,
            {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
            trained_by=("advantages",),
        ),
        # Pulled towards the sampler everywhere, with or without an advantage.
        _policy("dro", dro, required=("beta",)),
        _policy(
            "gspo",
            gspo,
            required=("clip_low_threshold", "clip_high_threshold"),
            masks=("sequence_ratio_mask",),
            sequence_inputs={"sequence_log_ratio": sequence_log_ratio},
            trained_by=("advantages", "sequence_ratio_mask"),
        ),
    )
}


def loss_names() -> tuple[str, ...]:
    """Return the losses that can be asked for."""
    return tuple(_LOSSES)


def get_loss(name: str) -> Loss:
    """Return the loss of that name. Raises DataError: there is none."""
    if name not in _LOSSES:
        raise DataError(f"unknown loss {name!r}; there are: {', '.join(_LOSSES)}")
    return _LOSSES[name]
