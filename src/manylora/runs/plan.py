"""What a run would do, found without loading a weight.

The base is built on torch's meta device from its configuration alone; the data are read and
tokenised, because only that tells the number of tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from manylora.config import AdapterEntry, RunFile
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.models import resolve_base
from manylora.models.vocabulary import Vocabulary, read_vocabulary
from manylora.processes.starting import check_split
from manylora.runs.order import DataOrder, total_steps
from manylora.runs.prepare import ends_notes, entry_encoder
from manylora.runs.sources import read_source
from manylora.types import BaseModelError, ConfigError, Datum, ManyloraError
from manylora.types.memory import adapter_bytes
from manylora.types.mesh import MeshShape


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """What one adapter's run would be.

    Attributes:
        rank: of its modules; smallest and largest differ with a `rank_pattern`.
        num_targets: linear layers that it acts on.
        num_bytes: weights, gradient and optimizer state; activations come on top.
        num_tokens: that go through the base over all steps.
        longest: tokens of the longest example, evaluation included.
        notes: what is worth knowing of its data.
    """

    name: str
    rank: tuple[int, int]
    num_targets: int
    num_params: int
    num_bytes: int
    num_examples: int
    num_eval_examples: int
    batch_size: int
    steps: int
    num_tokens: int
    longest: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a whole run would be."""

    base: str
    architecture: str
    base_params: int
    context_length: int | None
    out: str
    adapters: tuple[AdapterPlan, ...]

    def warnings(self) -> list[str]:
        """What would go wrong later."""
        noted = [f"adapter {plan.name}: {note}" for plan in self.adapters for note in plan.notes]
        if self.context_length is None:
            return noted
        return noted + [
            f"adapter {plan.name}: its longest example has {plan.longest} tokens; the base's "
            f"context ends at {self.context_length}"
            for plan in self.adapters
            if plan.longest > self.context_length
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "warnings": self.warnings()}


def plan_run(run: RunFile) -> RunPlan:
    """Plan every adapter of a run.

    Raises:
        BaseModelError, Unsupported, ConfigError, DataError: what would stop the run at its start.
    """
    folder = resolve_base(run.base)
    check_split(run.base, MeshShape.parse(run.mesh))
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"cannot open base {run.base!r}: {error}") from error
    sites, vocabulary = list_sites(model), read_vocabulary(folder)
    return RunPlan(
        base=run.base,
        architecture=type(model).__name__,
        base_params=sum(parameter.numel() for parameter in model.parameters()),
        context_length=getattr(config.get_text_config(), "max_position_embeddings", None),
        out=str(run.out),
        adapters=tuple(
            _plan_adapter(entry, sites, tokenizer, vocabulary) for entry in run.adapters
        ),
    )


def list_sites(model: Any) -> list[Site]:
    """The linear layers of a model. Their input groups cannot be told without running it, so each
    is a group of its own; sizes do not depend on that."""
    head = model.get_output_embeddings()
    return [
        Site(name, module.in_features, module.out_features, number, is_head=module is head)
        for number, (name, module) in enumerate(model.named_modules())
        if isinstance(module, nn.Linear)
    ]


def _plan_adapter(
    entry: AdapterEntry, sites: Sequence[Site], tokenizer: Any, vocabulary: Vocabulary
) -> AdapterPlan:
    spec = entry.spec()
    try:
        layout = plan_layout(spec, resolve_targets(spec, sites))
    except ConfigError as error:
        raise type(error)(f"adapter {entry.name}: {error}") from error
    notes = ends_notes(entry, tokenizer, vocabulary)
    train = _encoded(entry, entry.sft.train, tokenizer, vocabulary, notes)
    held_out: list[Datum] = []
    if entry.sft.eval:
        held_out = _encoded(entry, entry.sft.eval, tokenizer, vocabulary, notes)
    steps = total_steps(
        len(train),
        entry.sft.batch_size,
        epochs=entry.sft.epochs,
        max_steps=entry.sft.max_steps,
    )
    ranks = [factor.rank for factor in layout.factors]
    return AdapterPlan(
        name=entry.name,
        rank=(min(ranks), max(ranks)),
        num_targets=len(layout.factors),
        num_params=layout.num_params,
        num_bytes=adapter_bytes(layout.num_params, entry.lora.dtype),
        num_examples=len(train),
        num_eval_examples=len(held_out),
        batch_size=entry.sft.batch_size,
        steps=steps,
        num_tokens=_count_tokens(entry, train, steps),
        longest=max(map(len, [*train, *held_out])),
        notes=tuple(dict.fromkeys(notes)),
    )


def _encoded(
    entry: AdapterEntry, source: str, tokenizer: Any, vocabulary: Vocabulary, notes: list[str]
) -> list[Datum]:
    try:
        encoded = entry_encoder(entry, tokenizer, vocabulary).encode(read_source(source))
        notes += encoded.notes
        return encoded.data
    except ManyloraError as error:
        raise type(error)(f"adapter {entry.name}: {error}") from error


def _count_tokens(entry: AdapterEntry, train: Sequence[Datum], steps: int) -> int:
    lengths = np.array([len(datum) for datum in train])
    order = DataOrder(
        size=len(train),
        batch_size=entry.sft.batch_size,
        seed=entry.seed,
        shuffle=entry.sft.shuffle,
    )
    whole_epochs = steps // order.steps_per_epoch
    begun = range(whole_epochs * order.steps_per_epoch, steps)
    tokens = whole_epochs * lengths.sum() + sum(
        lengths[order.batch_indices(step)].sum() for step in begun
    )
    return int(tokens)
