"""Operations that cannot be run are refused before anything runs."""

from manylora.losses import Loss, Settings, get_loss
from manylora.models import BaseModel
from manylora.types import WANTED, DataError, Datum, DatumTooLong, ForwardBackward


def check(work: ForwardBackward, base: BaseModel) -> tuple[Loss, Settings]:
    """Return the operation's loss, if it can be run on this base. Raises DataError,
    DatumTooLong."""
    where = f"adapter {work.adapter!r}"
    try:
        loss = get_loss(work.loss)
        settings = loss.settings(work.config)
        if work.logprobs not in WANTED:
            raise DataError(f"logprobs is {work.logprobs!r}; it is one of {', '.join(WANTED)}")
        for number, datum in enumerate(work.data):
            where = f"adapter {work.adapter!r}, datum {number}"
            loss.check(datum)
            _check_tokens(datum, base)
    except DataError as error:
        raise type(error)(f"{where}: {error}") from error
    return loss, settings


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
