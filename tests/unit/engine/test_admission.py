"""What cannot fit is refused before it is allocated, with needed, free and what would fit."""

import re

import numpy as np
import pytest
import torch

from manylora.engine import Engine, admission, host_memory
from manylora.lora.layout import plan_layout
from manylora.lora.sites import resolve_targets
from manylora.models import base_memory as memory
from manylora.models import loading as opening
from manylora.sampling import step_rows as rows
from manylora.types import (
    AdamParams,
    AdapterSpec,
    BaseModelError,
    DoesNotFit,
    ForwardBackward,
    ForwardBackwardResult,
    Opening,
    OptimStep,
    Sample,
    SampleResult,
    SamplingParams,
    causal_datum,
)
from manylora.types.memory import adapter_bytes, bytes_per_parameter
from tests.models import TinyBases

WORDS = r"needs? [\d,.]+ [KMGT]?i?B .*[\d,.]+ [KMGT]?i?B (is|are) free.*would fit"


def work(name: str, tokens: int = 20) -> ForwardBackward:
    # One token more: the last is only ever predicted.
    tokens_T = np.random.default_rng(0).integers(3, 90, tokens + 1)
    return ForwardBackward(adapter=name, data=[causal_datum(tokens_T, np.ones(tokens + 1))])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_bytes_of_a_parameter_are_those_of_the_vectors(tiny: TinyBases, dtype):
    engine = Engine(Opening(str(tiny("llama"))))
    adapter = engine.create("a", AdapterSpec(rank=3, dtype=dtype))
    assert adapter.promised_bytes() > 0
    engine.forward_backward([work("a")])
    engine.optim_step([OptimStep(adapter="a", params=AdamParams(lr=1e-3))])
    assert adapter.num_bytes() == adapter_bytes(adapter.layout.num_params, dtype)
    assert adapter.promised_bytes() == 0
    assert bytes_per_parameter(dtype) == (16 if dtype == "fp32" else 18)


@pytest.fixture
def free(monkeypatch):
    """Sets what is free, with what torch's tensors were taken out of it."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(memory, "free_host_bytes", lambda: count)
        monkeypatch.setattr(memory, "freed_heap_bytes", lambda: 0)
        monkeypatch.setattr(host_memory.FreeMemory, "SECONDS", -1.0)  # every reading is too old

    return set_free


def test_an_adapter_of_a_million_ranks(tiny: TinyBases, monkeypatch):
    engine = Engine(Opening(str(tiny("llama"))))
    monkeypatch.setattr(torch, "tensor", None)  # nothing is allocated
    with pytest.raises(DoesNotFit, match=rf"adapter 'big' \(rank 1,000,000,000, .*{WORDS}"):
        engine.create("big", AdapterSpec(rank=1_000_000_000))
    assert not engine.adapters


def test_adapters_that_fit_alone_and_not_together(tiny: TinyBases, free):
    engine = Engine(Opening(str(tiny("llama"))))
    spec = AdapterSpec(rank=4)
    needed = adapter_bytes(
        plan_layout(spec, resolve_targets(spec, engine.sites)).num_params, "fp32"
    )
    twice = engine.decoder.promised_bytes
    free(twice + 2 * needed - 1)  # with what the first does not hold yet, one byte too few
    engine.create("first", spec)
    free(twice + 2 * needed - 1 - engine.adapters["first"].num_bytes())
    with pytest.raises(DoesNotFit, match="rank of at most 3 would fit"):
        engine.create("second", spec)
    engine.create("small", AdapterSpec(rank=2))


def test_a_rank_beyond_the_layers_own_is_legal(tiny: TinyBases):
    engine = Engine(Opening(str(tiny("llama"))))
    engine.create("a", AdapterSpec(rank=200))
    (result,) = engine.forward_backward([work("a")])
    assert isinstance(result, ForwardBackwardResult) and result.loss > 0


def test_a_datum_that_cannot_be_run_costs_its_adapter_alone(tiny: TinyBases, free):
    engine = Engine(Opening(str(tiny("llama"))))
    for name in ("a", "b"):
        engine.create(name, AdapterSpec(rank=1))
    config = engine.base.model.config
    free(config.num_hidden_layers * config.hidden_size * 4 * 30)
    long, short = engine.forward_backward([work("a", 31), work("b", 30)])
    assert isinstance(long, DoesNotFit) and "'a'" in str(long)
    assert "at most 30 tokens would fit" in str(long)
    assert isinstance(short, ForwardBackwardResult) and short.loss > 0


def test_what_is_free_is_asked_again_only_where_it_could_matter(tiny: TinyBases, monkeypatch):
    engine = Engine(Opening(str(tiny("llama"))))
    engine.create("a", AdapterSpec(rank=1))
    readings: list[int] = []
    config = engine.base.model.config
    each = config.num_hidden_layers * config.hidden_size * 4
    monkeypatch.setattr(host_memory.FreeMemory, "SECONDS", 3600.0)
    monkeypatch.setattr(
        host_memory, "free_bytes", lambda device: readings.append(200 * each) or readings[-1]
    )
    assert engine.free_bytes == 200 * each
    engine.forward_backward([work("a")] * 3)
    engine.forward_backward([work("a")])
    assert len(readings) == 1
    engine.forward_backward([work("a", 60)])  # more than a quarter of what there was
    assert len(readings) == 2


def test_a_base_is_refused_before_a_weight_is_read(tiny: TinyBases, free, monkeypatch):
    folder = tiny("llama")
    count = sum(p.numel() for p in Engine(Opening(str(folder))).base.model.parameters())
    monkeypatch.setattr(opening, "_open_whole", None)  # nothing is read
    free(count * 4 - 1)
    with pytest.raises(DoesNotFit, match=rf"base .*\({count:,} parameters in float32\).*{WORDS}"):
        Engine(Opening(str(folder)))
    with pytest.raises(BaseModelError, match="not callable"):  # in half of the bits it would be
        Engine(Opening(str(folder), dtype="bf16"))
    free(count * 2 - 1)
    with pytest.raises(DoesNotFit, match="in bfloat16"):
        Engine(Opening(str(folder), dtype="bf16"))


def sample(max_tokens: int, num_samples: int = 1) -> Sample:
    return Sample(
        adapter=None,
        prompts=[[5, 6, 7]],
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        num_samples=num_samples,
    )


def test_more_answers_than_there_is_memory_for(tiny: TinyBases):
    engine = Engine(Opening(str(tiny("llama"))))
    (error,) = engine.admit([sample(64, 10**12)])
    assert isinstance(error, DoesNotFit)
    assert "num_samples=1,000,000,000,000" in str(error) and "would fit" in str(error)
    assert not engine.decoding


def test_a_cache_that_does_not_fit(tiny: TinyBases, free):
    folder = tiny("llama", max_position_embeddings=4096)
    roomy = Engine(Opening(str(folder)))
    config = roomy.base.model.config
    free(
        roomy.decoder.promised_bytes
        + int(128 * admission.kv_bytes(config, 4) / admission.CACHE_SHARE)
        + 1
    )
    engine = Engine(Opening(str(folder)))
    assert engine.decoder.loop.longest == 128
    free(1 << 30)
    (error,) = engine.admit([sample(126)])
    assert isinstance(error, DoesNotFit) and "128 tokens would fit" in str(error)
    (result,) = engine.sample([sample(12)])
    assert isinstance(result, SampleResult) and len(result.sequences[0].tokens) <= 12


def test_bytes_of_a_token_are_those_of_the_cache(tiny: TinyBases):
    for family in ("llama", "qwen3", "gemma2"):
        engine = Engine(Opening(str(tiny(family))))
        engine.admit([sample(4)])
        engine.decode(0.0)
        cache = engine.decoder.loop._cache
        held = sum(layer.flat.nbytes for layer in cache._every_layer())
        text = engine.base.model.config.get_text_config()
        assert held == cache._capacity * admission.kv_bytes(text, 4), family


def test_weights_that_decoding_keeps_twice_are_counted_before_they_are(tiny: TinyBases, free):
    engine = Engine(Opening(str(tiny("llama")), threads=1))
    layers = [m for m in engine.base.model.modules() if type(m) is torch.nn.Linear]
    twice = sum(layer.weight.nbytes for layer in layers)
    assert engine.decoder.promised_bytes == twice > 0
    free(twice + (1 << 20))
    assert engine.room_bytes == 1 << 20
    asked = Sample(adapter=None, prompts=[np.array([3])], params=SamplingParams(max_tokens=2))
    free(twice - 1)
    (refused,) = engine.sample([asked])
    assert isinstance(refused, DoesNotFit)
    assert re.search(r"keeps the base's weights twice, " + WORDS, str(refused))
    assert engine.decoder.promised_bytes == twice
    free(twice + (1 << 20))
    (answer,) = engine.sample([asked])
    assert isinstance(answer, SampleResult)
    assert engine.decoder.promised_bytes == 0 and engine.room_bytes == twice + (1 << 20)


def test_weights_that_decoding_reads_as_they_are_are_not_counted(tiny: TinyBases, monkeypatch):
    monkeypatch.setattr(rows, "MOST_PACKED_BYTES", 1)
    assert Engine(Opening(str(tiny("llama")))).decoder.promised_bytes == 0
    assert Engine(Opening(str(tiny("qwen2_moe")))).decoder.promised_bytes == 0
