"""Reading and tokenising its data shows what supervised fine-tuning would do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manylora.config import AdapterEntry, SftSettings
from manylora.runs.course import CoursePlan
from manylora.runs.data_order import DataOrder, total_steps
from manylora.runs.sft_data import ends_notes, entry_encoder
from manylora.runs.sources import read_source
from manylora.types import Datum, ManyloraError

if TYPE_CHECKING:
    from manylora.models.vocabulary import Vocabulary


def plan_sft(entry: AdapterEntry, tokenizer: Any, vocabulary: "Vocabulary") -> CoursePlan:
    """Return the plan of an entry's course. Raises DataError, ConfigError, naming the adapter."""
    sft = SftSettings.of(entry)
    notes = ends_notes(entry, tokenizer, vocabulary)
    train, held_out = (
        _encoded(entry, source, tokenizer, vocabulary, notes) if source else []
        for source in (sft.train, sft.eval)
    )
    order = DataOrder(
        size=len(train), batch_size=sft.batch_size, seed=entry.seed, shuffle=sft.shuffle
    )
    steps = total_steps(len(train), sft.batch_size, epochs=sft.epochs, max_steps=sft.max_steps)
    return CoursePlan(
        num_examples=len(train),
        num_eval_examples=len(held_out),
        batch_size=sft.batch_size,
        steps=steps,
        num_tokens=_count_tokens(order, train, steps),
        longest=max(map(len, [*train, *held_out])),
        heaviest=_heaviest(order, train, steps),
        notes=tuple(dict.fromkeys(notes)),
    )


def _encoded(
    entry: AdapterEntry, source: str, tokenizer: Any, vocabulary: "Vocabulary", notes: list[str]
) -> list[Datum]:
    try:
        encoded = entry_encoder(entry, tokenizer, vocabulary).encode(read_source(source))
        notes += encoded.notes
        return encoded.data
    except ManyloraError as error:
        raise type(error)(f"adapter {entry.name}: {error}") from error


def _heaviest(order: DataOrder, train: Sequence[Datum], steps: int) -> list[Datum]:
    batches = (order.batch_indices(step) for step in range(min(steps, order.steps_per_epoch)))
    chosen = max(batches, key=lambda indices: sum(len(train[i]) for i in indices))
    return [train[i] for i in chosen]


def _count_tokens(order: DataOrder, train: Sequence[Datum], steps: int) -> int:
    lengths = np.array([len(datum) for datum in train])
    whole_epochs = steps // order.steps_per_epoch
    begun = range(whole_epochs * order.steps_per_epoch, steps)
    tokens = whole_epochs * lengths.sum() + sum(
        lengths[order.batch_indices(step)].sum() for step in begun
    )
    return int(tokens)
