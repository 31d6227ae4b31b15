"""Operations that cannot be run are refused before anything runs."""

import numpy as np

from manylora.losses import Loss, Settings, get_loss
from manylora.models import BaseModel
from manylora.types import WANTED, DataError, Datum, DatumTooLong, ForwardBackward


def check(work: ForwardBackward, base: BaseModel) -> tuple[Loss, Settings]:
    """Return the operation's loss, if it can be run on this base.

    Raises:
        DataError, DatumTooLong
    """
    where = work.called
    try:
        if work.backward and (work.adapter is None or work.snapshot is not None):
            raise DataError(
                "it is frozen and has no gradient; ask for a forward (backward=False), or name an "
                "adapter and no snapshot"
            )
        loss = get_loss(work.loss)
        # What it takes; it is the same loss.
        known = loss if work.reference_kl else loss.alone()
        settings = known.settings(work.config)
        if work.logprobs not in WANTED:
            raise DataError(f"logprobs is {work.logprobs!r}; it is one of {', '.join(WANTED)}")
        _check_temperature(work.temperature)
        for number, datum in enumerate(work.data):
            where = f"{work.called}, datum {number}"
            known.check(datum)
            _check_tokens(datum, base)
    except DataError as error:
        raise type(error)(f"{where}: {error}") from error
    return loss, settings


def _check_temperature(temperature: object) -> None:
    if isinstance(temperature, int | float) and not isinstance(temperature, bool):
        # The rows of the head have it in single precision, and divide by it.
        most = float(np.finfo(np.float32).max)
        if 1 / most <= temperature <= most:
            return
    raise DataError(
        f"temperature is {temperature!r}; it must be a finite number > 0 (1.0 changes nothing)"
    )


def _check_tokens(datum: Datum, base: BaseModel) -> None:
    if len(datum) > base.context_length:
        raise DatumTooLong(
            f"{len(datum)} tokens; the context of base {base.name!r} is "
            f"{base.context_length}: shorten or split it"
        )
    named = {"tokens": datum.tokens, "target_tokens": datum.loss_inputs["target_tokens"]}
    for name, tokens in named.items():
        if tokens.min() < 0 or tokens.max() >= base.vocab_size:
            stray = tokens[(tokens < 0) | (tokens >= base.vocab_size)].flat[0]
            raise DataError(f"{name} holds {stray}; token ids are 0 … {base.vocab_size - 1}")
