"""Law 1, first half: training together gives each adapter the bits that it gets alone.

Faults that were planted and seen to fail here: a neighbour's A, streams without padding, chunk
boundaries off by one, the head's pieces cut on a common grid, rows that begin off a cache line,
dropout drawn from a stream that all adapters share.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manylora.engine import Engine
from manylora.types import AdamParams, AdapterSpec, Opening, Wanted
from tests.laws.tenants import LOSSES, Tenant, assert_same_bits, assert_same_training, train
from tests.models import FAMILIES

pytestmark = pytest.mark.usefixtures("threads")
BOTH_THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True)
ROUNDS = 4


def crowd(attention: str = "q_proj") -> list[Tenant]:
    """Different in everything that may differ; `attention` is a leaf of this family."""
    return [
        Tenant(
            name="wide",
            spec=AdapterSpec(rank=8, alpha=16, seed=1),
            losses=("cross_entropy", "distillation"),
            num_data=4,
            untrained=0.7,
            wanted=("trained",),
        ),
        Tenant(
            name="leaves",
            spec=AdapterSpec(rank=3, alpha=5, targets=(attention, "down_proj"), seed=2),
            losses=("ppo", "gspo", "cispo"),
            calls=2,
            num_data=1,
        ),
        Tenant(
            name="head",
            spec=AdapterSpec(rank=33, alpha=20, targets=("o_proj", "lm_head"), seed=3),
            losses=("dro", "distillation", "gspo", "cross_entropy"),
            every=2,
            untrained=0.5,
            wanted=("trained", "all", "trained"),
            params=AdamParams(lr=3e-3, beta1=0.8, beta2=0.95, eps=1e-6),
        ),
        Tenant(
            name="patterns",
            spec=AdapterSpec(
                rank=1,
                alpha=2,
                rank_pattern={"o_proj": 5, r"layers\.1\..*down_proj": 2},
                alpha_pattern={"down_proj": 7},
                use_rslora=True,
                dtype="bf16",
                seed=4,
            ),
            losses=("importance_sampling",),
            join=1,
            leave=3,
        ),
        Tenant(
            name="dropped",
            spec=AdapterSpec(
                rank=4,
                targets=rf"model\.layers\.[02]\..*({attention}|down_proj)|lm_head",
                dropout=0.3,
                dtype="fp16",
                seed=5,
                init="gaussian",
            ),
            losses=tuple(LOSSES),
            num_data=7,
            lengths=(1, 9),
            leave=3,
            untrained=0.5,
            wanted=("all", "trained"),
        ),
    ]


def assert_alone_as_together(
    base: Path, tenants: list[Tenant], rounds: int = ROUNDS, vocab: int = 160, **options: Any
) -> None:
    together = train(Engine(Opening(str(base), **options)), tenants, rounds, vocab)
    engine = Engine(Opening(str(base), **options))
    for tenant in tenants:
        alone = train(engine, [tenant], rounds, vocab)
        assert_same_bits(alone[tenant.name], together[tenant.name], tenant.name)


def leaf(family: str) -> str:
    return "qkv_proj" if family == "phi3" else "q_proj"


@BOTH_THREADS
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tiny, family: str):
    assert_alone_as_together(tiny(family), crowd(leaf(family)), token_budget=192)


@pytest.mark.parametrize(("budget", "threads"), [(1, 1), (40, 2), (4096, 1)], indirect=["threads"])
def test_every_budget(tiny, budget: int):
    """From one datum a piece and a piece a micro-batch to everything in one."""
    assert_alone_as_together(tiny("qwen3"), crowd(), token_budget=budget)


@pytest.mark.parametrize(
    ("family", "threads"), [("qwen2", 1), ("gemma2", 1), ("llama", 2)], indirect=["threads"]
)
def test_a_half_precision_base(tiny, family: str):
    assert_alone_as_together(tiny(family), crowd(), token_budget=192, dtype="bf16")


@pytest.mark.parametrize(
    ("family", "threads"),
    [("llama", 1), ("llama", 2), ("mistral", 2), ("gemma2", 1)],
    indirect=["threads"],
)
def test_equal_lengths_across_neighbours(tiny, family: str):
    """Attention merges neighbouring sequences of one length, also those of different adapters."""
    tenants = [replace(tenant, lengths=(11, 12)) for tenant in crowd()]
    assert_alone_as_together(tiny(family), tenants)


def test_a_tied_head(tiny):
    assert_alone_as_together(tiny("qwen3", tie_word_embeddings=True), crowd(), token_budget=192)


def test_odd_sizes(tiny):
    """Rows that do not begin on a cache line."""
    base = tiny("llama", vocab_size=151, hidden_size=60, intermediate_size=75, head_dim=14)
    assert_alone_as_together(base, crowd(), vocab=151, token_budget=192)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_recomputed_activations(tiny, family: str):
    """Fused is solo with them, and both are what they are without, up to rounding."""
    base = tiny(family)
    tenants = crowd()
    assert_alone_as_together(base, tenants, activation_checkpointing=True)
    kept = train(Engine(Opening(str(base))), tenants, ROUNDS)
    recomputed = train(Engine(Opening(str(base), activation_checkpointing=True)), tenants, ROUNDS)
    for tenant in tenants:
        for a, b in zip(
            kept[tenant.name].gradients_P, recomputed[tenant.name].gradients_P, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(a.abs().max()))


def test_small_chunks_of_the_head(tiny, monkeypatch: pytest.MonkeyPatch):
    """The loss is cut into chunks of 32 rows, which end inside pieces."""
    monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, **__: 32)
    tenants = [replace(tenant, lengths=(15, 50)) for tenant in crowd()]
    assert_alone_as_together(tiny("llama"), tenants)


@BOTH_THREADS
@pytest.mark.parametrize("rows", [32, 1024])
def test_what_is_read_changes_nothing(tiny, monkeypatch: pytest.MonkeyPatch, rows: int):
    """An adapter learns the same, to the bit, whether it and its neighbours want to read every
    log-probability or those of the trained positions; also with dropout, and on the head."""
    monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, **__: rows)
    base = tiny("gemma2")
    tenants = [replace(tenant, lengths=(2, 50)) for tenant in crowd()]
    ways: tuple[tuple[Wanted, ...], ...] = (("all",), ("trained",), ())
    everything, trained, mixed = (
        train(
            Engine(Opening(str(base))),
            [replace(t, wanted=way or t.wanted) for t in tenants],
            ROUNDS,
        )
        for way in ways
    )
    for tenant in tenants:
        assert_same_training(everything[tenant.name], trained[tenant.name], tenant.name)
        assert_same_training(everything[tenant.name], mixed[tenant.name], tenant.name)


def test_neighbours_of_its_own_kind(tiny):
    """Twenty adapters of one rank, of which each still gets its own numbers."""
    tenants = [
        Tenant(name=f"twin-{i}", spec=AdapterSpec(rank=2, seed=i), num_data=1) for i in range(20)
    ]
    together = train(Engine(Opening(str(tiny("qwen2")))), tenants, 2)
    engine = Engine(Opening(str(tiny("qwen2"))))
    for tenant in tenants[::7]:
        alone = train(engine, [tenant], 2)
        assert_same_bits(alone[tenant.name], together[tenant.name], tenant.name)
    ends = [trace.end.weights for trace in together.values() if trace.end is not None]
    assert not any(np.array_equal(ends[0], other) for other in ends[1:])


@pytest.mark.slow
@BOTH_THREADS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("budget", [1, 64, 256, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_grid(tiny, family: str, budget: int, dtype: str):
    assert_alone_as_together(
        tiny(family), crowd(leaf(family)), rounds=8, token_budget=budget, dtype=dtype
    )


@pytest.mark.slow
@BOTH_THREADS
def test_a_wider_base(tiny):
    """Products large enough for the vendor's library to choose other kernels."""
    base = tiny(
        "qwen3", hidden_size=512, intermediate_size=1408, head_dim=128, vocab_size=8000,
        max_position_embeddings=1024,
    )  # fmt: skip
    tenants = [replace(tenant, lengths=(20, 200)) for tenant in crowd()]
    assert_alone_as_together(base, tenants, rounds=3, vocab=8000)
