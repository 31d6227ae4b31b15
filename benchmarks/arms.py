"""The arms of the multi-tenant benchmark compute the same tokens in four ways.

T tokens of the stream, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.engine import Engine
from manylora.engine.head_loss import HeadLoss
from manylora.engine.microbatch import build
from manylora.engine.plan import Piece, cut, pack
from manylora.lora.routing import RoutingTable, routing
from manylora.losses import get_loss
from manylora.models import PackedStream, open_base, packed
from manylora.types import (
    AdamParams,
    AdapterSpec,
    Datum,
    ForwardBackward,
    ManyloraError,
    Opening,
    OptimStep,
    Wanted,
    causal_datum,
)

RANKS = (4, 4, 8, 8, 8, 16, 16, 32)
ARMS = ("fused", "fused_fb", "bare", "bare_sequential", "peft")
SEQUENCE = 32  # tokens of a sequence; equal lengths, so that the sequential arm needs no padding
ADAM = AdamParams(lr=1e-4, clip_norm=1.0)


@dataclass(slots=True)
class Load:
    """A `Load` is every tenant's data for one step."""

    base: Path | str
    tokens: int
    ranks: dict[str, int]
    data: dict[str, list[Datum]]
    budget: int


def make_load(
    base: Path | str,
    vocab: int,
    tokens: int,
    ranks: Sequence[int] = RANKS,
    trained: float = 1.0,
) -> Load:
    """Make `tokens` per tenant for one tenant per entry of `ranks`, random ids of a fixed seed.

    Args:
        trained: share of a sequence's tokens, at its end, that are trained.
    """
    rng = np.random.default_rng(0)
    weights = np.zeros(SEQUENCE + 1)
    weights[-round(trained * SEQUENCE) :] = 1.0
    data = {}
    for number in range(len(ranks)):
        rows = rng.integers(0, vocab, (tokens // SEQUENCE, SEQUENCE + 1))
        data[f"tenant{number}"] = [causal_datum(row, weights) for row in rows]
    by_name = dict(zip(data, ranks, strict=True))
    return Load(base, tokens, by_name, data, budget=max(4096, tokens * len(ranks)))


def _checked(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, ManyloraError):
            raise outcome


class Fused:
    """`Fused` is the product: all tenants in one packed batch."""

    def __init__(self, load: Load, wanted: Wanted = "all"):
        self.engine = Engine(Opening(str(load.base), token_budget=load.budget))
        self.load = load
        for name, rank in load.ranks.items():
            self.engine.create(name, AdapterSpec(rank=rank, alpha=2 * rank))
        self.works = [
            ForwardBackward(adapter=n, data=d, logprobs=wanted) for n, d in load.data.items()
        ]
        self.steps = [OptimStep(adapter=n, params=ADAM) for n in load.data]

    def forward_backward(self) -> None:
        _checked(self.engine.forward_backward(self.works))

    def step(self) -> None:
        self.forward_backward()
        _checked(self.engine.optim_step(self.steps))


class Bare:
    """`Bare` runs the same packed batches on the base alone.

    The embedding's output asks for a gradient, so every product of the backward runs.
    """

    def __init__(self, load: Load):
        self.base = open_base(load.base)
        self.head = HeadLoss(self.base.head, group=-1)
        self.loss = (get_loss("cross_entropy"), get_loss("cross_entropy").settings({}))
        works = [ForwardBackward(adapter=n, data=d) for n, d in load.data.items()]
        pieces = [p for n, w in enumerate(works) for p in cut(n, w, load.budget)]
        self.together = pack(pieces, load.budget)
        self.apart = [[p for p in pieces if p.whose == name] for name in load.data]
        self.count = len(works)
        embedding = self.base.model.get_input_embeddings()
        embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_())

    def fused(self) -> None:
        """Run one batch of all tenants' tokens."""
        for batch in self.together:
            self._run(batch)

    def sequential(self) -> None:
        """Run one batch a tenant."""
        for batch in self.apart:
            self._run(batch)

    def _run(self, pieces: list[Piece]) -> None:
        batch = build(
            pieces, _NoAdapters(), [self.loss] * self.count, backward=False, device=self.base.device
        )
        table = RoutingTable(batch.segments, training=False)
        with routing(table), packed(PackedStream(batch.lengths, batch.total)):
            hidden_TH = self.base.hidden(batch.tokens_T, batch.positions_T)
            out = self.head(hidden_TH.detach(), batch.head, table, backward=True)
            hidden_TH.backward(out.grad_TH)
        torch.stack([out.logprobs_L, out.loss_L]).numpy()


class _NoAdapters(dict[str, Any]):
    """Every name in it is the bare base."""

    def __missing__(self, name: str) -> Any:
        return _NO_ADAPTER


class _NoAdapter:
    weights: None = None
    draws = 0


_NO_ADAPTER = _NoAdapter()


class SequentialPeft:
    """`SequentialPeft` trains one tenant after another with stock PEFT, as fast as we can make it.

    It has one model, adapters switched by `set_adapter`, SDPA, no padding, fused AdamW, the first
    layer's input gradient left out, gradients set to None, and the head on the trained rows only.
    """

    def __init__(self, load: Load):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from manylora.models import resolve_base

        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve_base(load.base), dtype=torch.float32, attn_implementation="sdpa"
        )
        configs = {
            name: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
            for name, rank in load.ranks.items()
        }
        (first, config), *others = configs.items()
        self.model: Any = get_peft_model(model, config, adapter_name=first)
        for name, config in others:
            self.model.add_adapter(name, config)
        self.model.train()
        self.batches: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        for name, data in load.data.items():
            tokens = torch.tensor(np.stack([d.tokens for d in data]))
            targets = torch.tensor(np.stack([d.loss_inputs["target_tokens"] for d in data]))
            weights = torch.tensor(np.stack([d.loss_inputs["weights"] for d in data]))
            trained = weights.flatten().nonzero()[:, 0]
            self.batches[name] = (tokens, targets.flatten()[trained], trained)
            own = [p for n, p in self.model.named_parameters() if f".{name}." in n]
            self.optimizers[name] = torch.optim.AdamW(own, lr=ADAM.lr, weight_decay=0.0, fused=True)

    def step(self) -> None:
        for name, optimizer in self.optimizers.items():
            self.model.set_adapter(name)
            tokens, targets, trained = self.batches[name]
            model = self.model.get_base_model()
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            if len(trained) < len(hidden):
                hidden = hidden[trained]
            loss = torch.nn.functional.cross_entropy(
                model.lm_head(hidden), targets, reduction="sum"
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], ADAM.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()


def arms(load: Load, chosen: Sequence[str] = ARMS) -> dict[str, Callable[[], None]]:
    """Return name → one step of that arm."""
    fused, bare = Fused(load), Bare(load)
    steps = {
        "fused": fused.step,
        "fused_fb": fused.forward_backward,
        "bare": bare.fused,
        "bare_sequential": bare.sequential,
    }
    if "peft" in chosen:
        steps["peft"] = SequentialPeft(load).step
    return {name: steps[name] for name in chosen}


def trained_arms(load: Load, whole: Load) -> dict[str, Callable[[], None]]:
    """Return name → one step, for data with some tokens trained and `whole` with all trained."""
    engine = Fused(load)
    everything, trained = Fused(whole), Fused(load, "trained")
    return {
        "everything_trained": everything.step,
        "all_read": engine.step,
        "trained_only": trained.step,
        "peft_selecting": SequentialPeft(load).step,
    }


def arithmetic_floor(base: Path | str, ranks: Sequence[int]) -> float:
    """Return a step's overhead if only multiplications cost time, attention's left out.

    Of the base's linear layers a token takes a product forwards and one backwards; an adapter's
    A and B take one forwards and two backwards each.
    """
    engine = Engine(Opening(str(base)))
    products = sum(site.in_features * site.out_features for site in engine.sites)
    engine.create("one", AdapterSpec(rank=1))
    of_rank_one = engine.adapters["one"].layout.num_params
    return 1.0 + 6 * of_rank_one * sum(ranks) / len(ranks) / (4 * products)
