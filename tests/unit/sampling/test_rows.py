"""A step is filled up only as far as its rows' bits need it, on a base of a real one's widths."""

from typing import Any

import numpy as np
import pytest
import torch

from manylora.engine import Engine
from manylora.lora.groups import groups_of
from manylora.sampling import DecodeLoop
from manylora.sampling import step_rows as rows
from manylora.types import AdapterSpec, Opening, Sample, SampleResult, SamplingParams
from tests.laws.tenants import perturb

pytestmark = pytest.mark.usefixtures("threads")
NAMES = ("a4", "a8", "a32", None)
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8},
]


@pytest.fixture(scope="module")
def folder(tiny) -> Any:
    return tiny(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        num_hidden_layers=2,
        vocab_size=4096,
        tie_word_embeddings=True,
    )


def engine_of(folder: Any, dtype: str) -> Engine:
    engine = Engine(Opening(str(folder), dtype=dtype))
    for name, rank in (("a4", 4), ("a8", 8), ("a32", 32)):
        engine.create(name, AdapterSpec(rank=rank, alpha=2 * rank, seed=rank))
        perturb(engine, name)
    return engine


def samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            adapter=NAMES[number % len(NAMES)],
            prompts=[rng.integers(3, 4096, 3 + number % 5)],
            params=SamplingParams(
                max_tokens=3 + number % 4, stop=(), seed=number, **SETTINGS[number % 3]
            ),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("way", ["found", "weights as they are", "multiples"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_bits_are_a_sequences_own(threads: int, dtype: str, way: str, folder, monkeypatch):
    if way == "weights as they are":
        monkeypatch.setattr(rows, "MOST_PACKED_BYTES", 0)
    elif way == "multiples":
        monkeypatch.setattr(rows, "_only_known", lambda model, layers: False)
    engine = engine_of(folder, dtype)
    asked = samples(11)
    together = engine.sample(asked)
    for sample, answer in zip(asked, together, strict=True):
        assert isinstance(answer, SampleResult)
        assert engine.sample([sample]) == [answer]
    found = engine.decoder.loop.step_rows()
    assert found.packed == (way == "found" and found.packed)
    assert bool(found.hidden.counts) == (way != "multiples")
    assert found.hidden.holding(300) == (304 if dtype == "fp32" else 320)


def test_a_short_step_has_few_rows(folder, monkeypatch):
    """As few as the trials say: all that is run between two draws is so long."""
    engine = engine_of(folder, "fp32")
    lengths: list[int] = []
    real = engine.base.hidden

    def hidden(tokens_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        lengths.append(len(tokens_T))
        return real(tokens_T, positions_T)

    monkeypatch.setattr(type(engine.base), "hidden", lambda _, *args: hidden(*args))
    params = SamplingParams(max_tokens=4, temperature=0.0, stop=())
    engine.sample([Sample(adapter="a8", prompts=[[5, 6]], params=params)])
    expected = engine.decoder.loop.step_rows().hidden.holding(1)
    assert lengths == [32, expected, expected, expected]
    assert expected < 16


def test_what_is_found_does_not_depend_on_the_loops_room(folder):
    engine = engine_of(folder, "fp32")
    small = DecodeLoop(engine.base, max_sequences=2)
    assert small.step_rows() == engine.decoder.loop.step_rows()


def test_one_number_that_differs_closes_the_way(folder, monkeypatch):
    """Weights are kept twice only if every number of rows of every product is safe."""
    real = rows.safe_packed
    monkeypatch.setattr(
        rows,
        "safe_packed",
        lambda k, n, *rest: real(k, n, *rest) - ({40} if (k, n) == (1536, 576) else set()),
    )
    engine = engine_of(folder, "fp32")
    found = engine.decoder.loop.step_rows()
    assert not found.packed
    assert "weights as they are" in found.told()
    groups = groups_of(engine.base.model)
    assert not any(group.packed for group in groups.values())


def test_a_function_that_differs_is_filled_up(folder, monkeypatch):
    safe = frozenset({4, 8, 16})
    monkeypatch.setattr(rows, "safe_for_functions", lambda *_: safe)
    found = engine_of(folder, "fp32").decoder.loop.step_rows()
    assert found.hidden.holding(1) == 4
    assert set(found.hidden.counts) <= {n for n in range(1, 257) if n in safe or n % 16 == 0}


def test_experts_are_not_tried(tiny):
    engine = Engine(
        Opening(
            str(tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))
        )
    )
    found = engine.decoder.loop.step_rows()
    assert (found.packed, found.hidden.counts, found.logits.counts) == (False, (), ())
