"""The losses by name, with the inputs and settings each one takes.

T tokens.

Every loss is a plain sum over tokens and data (no mean, no normalisation): with
l = log p(target) at temperature 1, q the sampling policy's log-probability, A the advantage and
r = exp(l - q), a loss function returns each token's loss and its derivative by l.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from manylora.losses.cispo import cispo
from manylora.losses.cross_entropy import cross_entropy
from manylora.losses.dro import dro
from manylora.losses.importance_sampling import importance_sampling
from manylora.losses.ppo import ppo
from manylora.types import DataError, Datum

Settings = Mapping[str, float]
LossFunction = Callable[[Tensor, Mapping[str, Tensor], Settings], tuple[Tensor, Tensor]]

POLICY_INPUTS = ("logprobs", "advantages")


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss.

    Attributes:
        name: as clients call it.
        inputs: per-token fp32 arrays that a datum brings beside `target_tokens`.
        function: (logprobs [T], inputs, settings) → (loss [T], d loss / d logprobs [T]).
        defaults: settings and their default values.
        required: settings that have no default.
    """

    name: str
    inputs: tuple[str, ...]
    function: LossFunction
    defaults: Settings = field(default_factory=dict)
    required: tuple[str, ...] = ()

    def settings(self, config: Mapping[str, float] | None) -> Settings:
        """The complete settings.

        Raises:
            DataError: a setting is unknown, missing or not a number.
        """
        given = dict(config or {})
        known = {*self.defaults, *self.required}
        for name, value in given.items():
            if name not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise DataError(f"loss {self.name!r} has no setting {name!r}; it takes: {listed}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DataError(
                    f"setting {name!r} of loss {self.name!r} is {value!r}, not a number"
                )
        for name in self.required:
            if name not in given:
                raise DataError(f"loss {self.name!r} needs the setting {name!r}; it has no default")
        return {**self.defaults, **given}

    def check(self, datum: Datum) -> None:
        """Refuse a datum whose inputs are not this loss's.

        Raises:
            DataError: an input is missing or unknown; the message names it.
        """
        given = set(datum.loss_inputs) - {"target_tokens"}
        for name in self.inputs:
            if name not in given:
                raise DataError(
                    f"loss {self.name!r} needs the input {name!r}, one number per token"
                )
        for name in sorted(given - set(self.inputs)):
            takes = ", ".join(("target_tokens", *self.inputs))
            raise DataError(f"loss {self.name!r} has no input {name!r}; it takes: {takes}")


_LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", ("weights",), cross_entropy),
        Loss("importance_sampling", POLICY_INPUTS, importance_sampling),
        Loss("ppo", POLICY_INPUTS, ppo, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        Loss(
            "cispo", POLICY_INPUTS, cispo, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
        ),
        Loss("dro", POLICY_INPUTS, dro, required=("beta",)),
    )
}


def loss_names() -> tuple[str, ...]:
    """The losses that can be asked for."""
    return tuple(_LOSSES)


def get_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        DataError: there is none.
    """
    if name not in _LOSSES:
        raise DataError(f"unknown loss {name!r}; there are: {', '.join(_LOSSES)}")
    return _LOSSES[name]
