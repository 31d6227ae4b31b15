"""Prompts are tokenised as those of fine-tuning are, so that both see the same ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manylora.config import AdapterEntry
from manylora.config.rl import RlSettings
from manylora.runs.encode import Between, Encoder, nothing
from manylora.runs.rl.prompt_rows import PromptRow, PromptRows, read_prompts
from manylora.types import DataError, DatumTooLong, SamplingParams, TextFormat

if TYPE_CHECKING:
    from manylora.models.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Prompts:
    """`Prompts` are all prompts of a source, with their tokens.

    Attributes:
        source: the rows, each with its tokens.
        encoder: makes tokens of further texts.
        text_format: how the texts became tokens, and which tokens end an answer where the run file
            names none.
    """

    source: PromptRows
    encoder: Encoder
    text_format: TextFormat

    @property
    def rows(self) -> Sequence[PromptRow]:
        """These are the prompts, in the order of the source."""
        return self.source.rows

    def __len__(self) -> int:
        return len(self.source)

    @property
    def longest(self) -> int:
        """The longest prompt has so many tokens."""
        return max(len(row.tokens) for row in self.rows)


def prompt_encoder(
    entry: AdapterEntry, tokenizer: Any, vocabulary: "Vocabulary", between: Between = nothing
) -> Encoder:
    """Return how an entry's prompts become tokens on a base. Raises DataError without tokenizer."""
    if tokenizer is None:
        raise DataError("the base's folder has no tokenizer, so text cannot be read")
    return Encoder(
        tokenizer,
        chat_template=entry.chat_template,
        ends=vocabulary.ends,
        vocab_size=vocabulary.size,
        between=between,
    )


def open_prompts(
    source: str | PromptRows,
    tokenizer: Any,
    vocabulary: "Vocabulary",
    entry: AdapterEntry,
    context_length: int | None,
    max_tokens: int,
    *,
    between: Between = nothing,
) -> Prompts:
    """Read and tokenise all prompts.

    Args:
        source: what the run file names, or rows that were read before.
        vocabulary: says how many tokens the base knows, and which end an answer.
        context_length: tokens that the base can read; None or 0 = any number.
        max_tokens: of the longest answer.

    Raises:
        DataError: a row is wrong, or cannot be rendered; names the file and the line.
        DatumTooLong: a prompt with its longest answer is longer than the base's context.
    """
    rows = read_prompts(source, between=between) if isinstance(source, str) else source
    encoder = prompt_encoder(entry, tokenizer, vocabulary, between)
    texts = [_text(encoder, row) for row in rows.rows]
    front = tuple(encoder.front())
    tokenised: list[PromptRow] = []
    for row, ids in zip(rows.rows, encoder.tokens(texts), strict=True):
        tokens = tuple(ids) if row.chat else (*front, *ids)
        if wrong := encoder.unknown(tokens):
            raise DataError(f"{row.place}: {wrong}")
        if not tokens:
            raise DataError(f"{row.place}: the prompt has no tokens; drop the row")
        if context_length and len(tokens) + max_tokens > context_length:
            raise DatumTooLong(
                f"{row.place}: has {len(tokens)} tokens, and an answer may have {max_tokens}; the "
                f"base's context holds {context_length}, so shorten the prompt, drop the row, or "
                f"lower rl.sampling.max_tokens of adapter {entry.name!r}"
            )
        tokenised.append(replace(row, tokens=tokens))
    ends: set[int] = set()
    for row in _unlike(rows.rows):
        ends.update(encoder.answer_ends(row.options if row.chat else None))
    return Prompts(
        replace(rows, rows=tokenised), encoder, TextFormat(tuple(sorted(ends)), entry.chat_template)
    )


def answer_params(settings: RlSettings, prompts: Prompts) -> SamplingParams:
    """Return how answers are drawn in training; they end where fine-tuning would end them, unless
    the run file says otherwise."""
    sampling = settings.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        stop=prompts.text_format.stop if sampling.stop is None else tuple(sampling.stop),
        stop_strings=tuple(sampling.stop_strings),
    )


def _text(encoder: Encoder, row: PromptRow) -> str:
    if not row.chat:
        return row.text
    try:
        return encoder.asking(row.messages, row.options)
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from error


def _unlike(rows: Sequence[PromptRow]) -> Sequence[PromptRow]:
    """Return a row for each way in which a template may be told something: asking it takes time."""
    found = {(row.chat, tuple(sorted(row.options))): row for row in rows}
    return list(found.values())
