"""A plan says what a run would do, and is made without loading a weight.

The base is built on torch's meta device from its configuration alone; the data are read and
tokenised, because only that tells the number of tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from manylora.config import AdapterEntry, RunFile
from manylora.engine.admission import kv_bytes
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.models import attention, resolve_base
from manylora.models.base_memory import base_bytes, free_bytes, opened_dtype
from manylora.models.cache import FIRST_TOKENS, blocks
from manylora.models.naming import namings
from manylora.models.tokenizer import open_tokenizer
from manylora.models.vocabulary import Vocabulary, read_vocabulary
from manylora.processes.group import check_split
from manylora.runs.course import refuse_unwritable
from manylora.runs.evaluate import SAMPLE_CHUNK
from manylora.runs.footprint import (
    OPENING_BYTES,
    TRIAL_BYTES,
    MemoryPlan,
    activation_bytes,
    process_bytes,
)
from manylora.runs.kinds import kind_of
from manylora.runs.outcome import error_dict
from manylora.runs.sft_data import EXTRA_TOKENS
from manylora.sampling.loop import MAX_CACHED_TOKENS
from manylora.sampling.step_rows import twice_bytes
from manylora.types import BaseModelError, ConfigError, DataError, Datum, ManyloraError
from manylora.types.memory import adapter_bytes
from manylora.types.mesh_shape import MeshShape


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """An `AdapterPlan` says what one adapter's run would be.

    Attributes:
        rank: of its modules; smallest and largest differ with a `rank_pattern`.
        num_targets: linear layers that it acts on.
        num_bytes: weights, gradient and optimizer state; activations come on top.
        num_tokens: that go through the base over all steps.
        longest: tokens of the longest example, evaluation included.
        notes: what is worth knowing of its data.
        details: lines for people that only its kind of run has.
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
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A `RunPlan` says what a whole run would be.

    Attributes:
        faults: of adapters that cannot be planned: name → the error; they are not in `adapters`.
    """

    base: str
    architecture: str
    base_params: int
    context_length: int | None
    out: str
    adapters: tuple[AdapterPlan, ...]
    memory: MemoryPlan
    faults: dict[str, ManyloraError] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return what would go wrong later."""
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
        """Return plain data."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        faults = {name: error_dict(error) for name, error in self.faults.items()}
        plain = asdict(replace(self, faults={}))
        return {**plain, "memory": memory, "warnings": self.warnings(), "faults": faults}


def plan_run(run: RunFile, *, apart: bool = False) -> RunPlan:
    """Plan every adapter of a run.

    Args:
        apart: plan the others where one cannot be planned; if none can, the first error is raised.

    Raises:
        BaseModelError, Unsupported, ConfigError, DataError: what would stop the run at its start.
    """
    folder = resolve_base(run.base)
    check_split(run.base, MeshShape.parse(run.mesh))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"cannot open base {run.base!r}: {error}") from error
    tokenizer = open_tokenizer(folder)
    if tokenizer is None:
        raise DataError("the base's folder has no tokenizer, so text cannot be read")
    sites, vocabulary = list_sites(model), read_vocabulary(folder)
    planned: list[tuple[AdapterPlan, Sequence[Datum]]] = []
    faults: dict[str, ManyloraError] = {}
    for entry in run.adapters:
        try:
            planned.append(_plan_adapter(entry, sites, tokenizer, vocabulary))
        except ManyloraError as error:
            if not apart:
                raise
            faults[entry.name] = error
    if not planned:
        raise next(iter(faults.values()))
    whole = [entry for entry in run.adapters if entry.name not in faults]
    run = run.model_copy(update={"adapters": whole})
    return RunPlan(
        base=run.base,
        architecture=type(model).__name__,
        base_params=sum(parameter.numel() for parameter in model.parameters()),
        context_length=getattr(config.get_text_config(), "max_position_embeddings", None),
        out=str(run.out),
        adapters=tuple(plan for plan, _ in planned),
        memory=_memory(run, config, model, planned),
        faults=faults,
    )


def _memory(
    run: RunFile, config: Any, model: Any, planned: Sequence[tuple[AdapterPlan, Sequence[Datum]]]
) -> MemoryPlan:
    mesh = MeshShape.parse(run.mesh)
    named = opened_dtype(config, run.dtype)
    base = base_bytes(model, named, run.quantization)
    adapters = sum(
        adapter_bytes(plan.num_params, entry.lora.dtype, mesh.dp) // mesh.tp
        for entry, (plan, _) in zip(run.adapters, planned, strict=True)
    )
    place = _place(run.device)
    # The processes of a mesh share a host's memory; each has a device of its own.
    free = free_bytes(place) // (mesh.size if place.type == "cpu" else 1)
    plain, recomputed = 0, None
    if base // mesh.one.size + adapters < free:  # otherwise nothing else matters
        heaviest = {
            entry.name: (entry.spec(), data)
            for entry, (_, data) in zip(run.adapters, planned, strict=True)
        }

        def make_model() -> Any:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    config, dtype=named, attn_implementation=attention.NAME
                )

        plain, recomputed = (
            activation_bytes(make_model, heaviest, run.token_budget, recomputed=way)
            for way in (False, True)
        )
    plain = plain or 0
    used = recomputed if run.activation_checkpointing and recomputed is not None else plain
    return MemoryPlan(
        process=process_bytes(),
        base=base // mesh.one.size,
        adapters=adapters,
        plain=plain // mesh.tp,
        recomputed=None if recomputed is None else recomputed // mesh.tp,
        activations=used // mesh.tp,
        ranks=mesh.size,
        free=free,
        **_to_sample(run, mesh, model, named, [plan for plan, _ in planned]),
    )


def _to_sample(
    run: RunFile, mesh: MeshShape, model: Any, dtype: torch.dtype, planned: Sequence[AdapterPlan]
) -> dict[str, int]:
    """Return what evaluations that sample add to a plan's memory."""
    tokens = sum(
        blocks(plan.longest + EXTRA_TOKENS) * min(plan.num_eval_examples, 2 * SAMPLE_CHUNK)
        for plan in planned
        if plan.num_eval_examples
    )
    if not tokens:
        return {"libraries": OPENING_BYTES, "decode_cache": 0}
    each = kv_bytes(model.config.get_text_config(), dtype.itemsize, mesh.tp)
    cached = max(FIRST_TOKENS, 1 << (tokens - 1).bit_length())
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    alone = mesh.size == 1 and run.quantization is None and _place(run.device).type == "cpu"
    twice = twice_bytes(model, layers, dtype.itemsize) if alone else 0
    return {
        "libraries": OPENING_BYTES + (TRIAL_BYTES if alone else 0),
        "decode_weights": twice,
        "decode_cache": min(cached, MAX_CACHED_TOKENS) * each,
        # A cache that has grown is given up when it is empty.
        "kept_cache": FIRST_TOKENS * each if cached == FIRST_TOKENS else 0,
    }


def _place(device: str) -> torch.device:
    """Return where the run would be; this machine's CPU where it has no such device."""
    named = torch.device("cuda" if device == "auto" else device)
    return named if named.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")


def list_sites(model: Any) -> list[Site]:
    """Return the linear layers of a model. Their input groups cannot be told without running it, so
    each is a group of its own; sizes do not depend on that."""
    head = model.get_output_embeddings()
    linears = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    naming = namings(model, linears.values())
    return [
        Site(
            name,
            module.in_features,
            module.out_features,
            number,
            is_head=module is head,
            naming=naming[name],
        )
        for number, (name, module) in enumerate(linears.items())
    ]


def _plan_adapter(
    entry: AdapterEntry, sites: Sequence[Site], tokenizer: Any, vocabulary: Vocabulary
) -> tuple[AdapterPlan, Sequence[Datum]]:
    """Return what its run would be, and the data of its heaviest step."""
    spec = entry.spec()
    try:
        layout = plan_layout(spec, resolve_targets(spec, sites))
    except ConfigError as error:
        raise type(error)(f"adapter {entry.name}: {error}") from error
    refuse_unwritable(entry, sites)
    planned = kind_of(entry).plan(entry, tokenizer, vocabulary)
    ranks = [factor.rank for factor in layout.factors]
    plan = AdapterPlan(
        name=entry.name,
        rank=(min(ranks), max(ranks)),
        num_targets=len(layout.factors),
        num_params=layout.num_params,
        num_bytes=adapter_bytes(layout.num_params, entry.lora.dtype),
        num_examples=planned.num_examples,
        num_eval_examples=planned.num_eval_examples,
        batch_size=planned.batch_size,
        steps=planned.steps,
        num_tokens=planned.num_tokens,
        longest=planned.longest,
        notes=planned.notes,
        details=planned.details,
    )
    return plan, planned.heaviest
