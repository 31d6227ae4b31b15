"""Who else is in the loop, and since when, changes nothing: not a bit of an answer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora.engine import Engine
from manylora.engine.decoding import Decoder
from manylora.sampling import DecodeLoop
from manylora.types import (
    AdapterSpec,
    DataError,
    DatumTooLong,
    ManyloraError,
    NotFinite,
    Opening,
    Sample,
    SampleResult,
    SamplingParams,
)
from tests.laws.tenants import perturb
from tests.models import VOCAB

pytestmark = pytest.mark.usefixtures("threads")
SPECS = {
    "all": AdapterSpec(rank=8, alpha=32, seed=1),
    "head": AdapterSpec(rank=3, alpha=6, targets=("o_proj", "lm_head"), seed=2),
    "half": AdapterSpec(rank=4, alpha=16, dtype="bf16", seed=3),
    "wide": AdapterSpec(rank=33, alpha=33, targets=("down_proj", "o_proj"), seed=4),
}
NAMES = [*SPECS, None]
CONTEXT = 2048


def engine_of(folder: Any, dtype: str = "fp32") -> Engine:
    engine = Engine(Opening(str(folder), dtype=dtype))
    for name, spec in SPECS.items():
        engine.create(name, spec)
        perturb(engine, name)
    return engine


@pytest.fixture(scope="module")
def engine(tiny) -> Engine:
    return engine_of(tiny("llama", max_position_embeddings=CONTEXT))


def decoder(engine: Engine, **limits: int) -> Decoder:
    """Sampling verbs with a loop of their own."""
    loop = DecodeLoop(engine.base, **{"token_budget": 48, **limits})
    return Decoder(engine.base, loop, engine._weights_of)


def request(
    adapter: str | None, length: int, count: int, num_samples: int = 1, **settings: Any
) -> Sample:
    prompt = np.random.default_rng(length).integers(3, VOCAB, length)
    params = SamplingParams(max_tokens=count, stop=(), **settings)
    return Sample(adapter=adapter, prompts=[prompt], params=params, num_samples=num_samples)


def alone(engine: Engine, sample: Sample) -> SampleResult:
    (result,) = decoder(engine).sample([sample])
    assert isinstance(result, SampleResult)
    return result


def run(
    verbs: Decoder, joins: dict[int, list[Sample]], leaves: dict[int, list[Sample]] | None = None
) -> dict[int, SampleResult | ManyloraError]:
    """Results by the requests' identity; `joins` and `leaves` say before which step."""
    found: dict[int, SampleResult | ManyloraError] = {}
    number = 0
    while number <= max(joins) or verbs.decoding:
        assert all(error is None for error in verbs.admit(joins.get(number, [])))
        for sample in (leaves or {}).get(number, []):
            verbs.cancel(sample)
        found.update((id(sample), result) for sample, result in verbs.decode(0.0))
        number += 1
        assert number < 5000
    return found


REQUESTS = st.builds(
    request,
    st.sampled_from(NAMES),
    st.sampled_from([1, 2, 17, 47, 48, 49, 63, 64, 65, 100, 200]),
    st.integers(1, 12),
    st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 1.0, 0.6]),
    seed=st.integers(0, 5),
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    crowd=st.lists(
        st.tuples(REQUESTS, st.integers(0, 20), st.none() | st.integers(0, 30)), max_size=9
    ),
    limits=st.sampled_from([(256, 1 << 16), (5, 1 << 16), (64, 1024), (2, 512)]),
)
def test_answers_do_not_depend_on_joins_and_leaves(engine: Engine, crowd, limits):
    verbs = decoder(engine, max_sequences=limits[0], max_cached_tokens=limits[1])
    joins: dict[int, list[Sample]] = {0: []}
    leaves: dict[int, list[Sample]] = {}
    for sample, join, leave in crowd:
        joins.setdefault(join, []).append(sample)
        if leave is not None:
            leaves.setdefault(join + leave, []).append(sample)
    found = run(verbs, joins, leaves)
    stayed = [sample for sample, _, leave in crowd if leave is None]
    assert {id(sample) for sample in stayed} <= set(found)
    for sample, _, _ in crowd:
        if id(sample) in found:
            assert found[id(sample)] == alone(engine, sample)
    assert empty(verbs)


def empty(verbs: Decoder) -> bool:
    """Whether everything was given back."""
    loop = verbs.loop
    return (
        len(loop) == verbs.decoding == loop._cache.used_tokens == 0
        and loop._cache._free[0].tokens == loop._cache.max_tokens
        and len(loop._slots._free) == len(loop._slots.prompt)
        and not loop._running
        and not loop._room._held
        and not loop._room._waiting
    )


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "fp32"),
        ("gemma2", "fp32"),
        ("mistral", "fp32"),
        ("qwen3", "bf16"),
        ("phi3", "fp32"),
    ],
)
def test_long_ones_too(tiny, family: str, dtype: str):
    """Past 512 tokens, grouped heads, windows, softcaps, half precision; late joiners."""
    engine = engine_of(tiny(family, max_position_embeddings=CONTEXT), dtype)
    limits = {"token_budget": 600}
    mine = [
        request(name, length, 70, temperature=1.0)
        for name, length in (("all", 500), ("head", 1000), (None, 1100), ("half", 3))
    ]
    expected = [decoder(engine, **limits).sample([sample])[0] for sample in mine]
    joins: dict[int, list[Sample]] = {0: [], 5: mine[:2], 9: mine[2:]}
    for number in range(24):
        other = request(NAMES[number % 5], 1 + 37 * number, 1 + 7 * (number % 9), seed=number)
        joins.setdefault(number, []).append(other)
    found = run(decoder(engine, **limits), joins)
    assert [found[id(sample)] for sample in mine] == expected


@pytest.mark.parametrize("name", NAMES)
def test_continuations_of_one_prompt(engine: Engine, name: str | None):
    """They differ; the first is the one that a single continuation gives; more change nothing."""
    crowd = alone(engine, request(name, 70, 9, 37, temperature=1.0)).sequences
    many = alone(engine, request(name, 70, 9, 7, temperature=1.0)).sequences
    assert len({s.tokens for s in crowd}) == 37 and crowd[:7] == many
    assert alone(engine, request(name, 70, 9, 1, temperature=1.0)).sequences == many[:1]
    assert alone(engine, request(name, 70, 9, 3, temperature=1.0)).sequences == many[:3]
    verbs = decoder(engine, max_sequences=2, max_cached_tokens=128)  # room for one at a time
    (result,) = verbs.sample([request(name, 70, 9, 7, temperature=1.0)])
    assert isinstance(result, SampleResult) and result.sequences == many
    assert empty(verbs)


def test_a_prompt_is_read_once_for_all_its_continuations(engine: Engine, monkeypatch):
    verbs, read = decoder(engine, token_budget=512), []
    inner = verbs.loop._read
    monkeypatch.setattr(
        verbs.loop, "_read", lambda chunks: (read.append([n for _, n in chunks]), inner(chunks))
    )
    verbs.sample([request("all", 300, 5, 8, temperature=1.0)])
    assert read == [[300]]


def test_a_long_prompt_does_not_stall_the_others(engine: Engine, monkeypatch):
    """No step reads more than the budget, and the running sequence gets a token at each."""
    verbs, read = decoder(engine, token_budget=64), []
    inner = verbs.loop._read
    monkeypatch.setattr(
        verbs.loop, "_read", lambda c: (read.append(sum(n for _, n in c)), inner(c))
    )
    short, long = request(None, 3, 1000), request("all", 1500, 1)
    verbs.admit([short])
    verbs.decode(0.0)
    verbs.admit([long, *(request("head", 40, 2) for _ in range(5))])
    for number in range(2, 20):
        verbs.decode(0.0)
        assert verbs.loop._slots.generated.max() == number
    assert max(read) <= 64 and sum(read) > 1000
    verbs.cancel(short)


def test_a_flood_of_prompts_delays_nobody(engine: Engine):
    """The newcomer's prompt is read in the next step, and it has a place to run."""
    verbs = decoder(engine, token_budget=64, max_sequences=16)
    verbs.admit([replace(request(None, 60, 50), tenant="flooder") for _ in range(100)])
    for _ in range(30):
        verbs.decode(0.0)
    for number in range(2):
        single = replace(request("all", 50, 1), tenant=f"other-{number}")
        verbs.admit([single])
        assert any(sample is single for sample, _ in verbs.decode(0.0))


def test_a_large_request_gets_its_room_in_the_end(engine: Engine):
    """Small ones keep coming and would always fit."""
    verbs = decoder(engine, max_cached_tokens=1024)
    large = replace(request(None, 3, 1000), tenant="large")
    small = [replace(request(None, 3, 60), tenant=f"t{n}") for n in range(4)]
    verbs.admit(small)
    verbs.decode(0.0)
    verbs.admit([large])
    steps = 0
    while verbs.loop._slots.limit.max() < 900:
        steps += 1
        assert steps < 600
        done = verbs.decode(0.0)
        verbs.admit(
            [replace(request(None, 3, 60), tenant=s.tenant) for s, _ in done if s is not large]
        )
    for waiting in list(verbs.loop._prompts):
        verbs.loop.cancel(waiting)


def test_nan_stays_with_its_own(engine: Engine):
    """Weights that run away, in a loop so full that others take over their slots and cache."""
    engine.create("lost", AdapterSpec(rank=2, targets=("k_proj", "v_proj")))
    try:
        engine.adapters["lost"].master_P.fill_(torch.nan)
        sound = [request(NAMES[n % 5], 20 + n, 6, seed=n, temperature=1.0) for n in range(12)]
        expected = [alone(engine, sample) for sample in sound]
        lost = [request("lost", 30 + n, 40, 2) for n in range(12)]
        verbs = decoder(engine, max_sequences=6, max_cached_tokens=512)
        joins = {n: [lost[n], sound[n]] for n in range(12)}
        found = run(verbs, joins)
        assert all(isinstance(found[id(sample)], NotFinite) for sample in lost)
        assert [found[id(sample)] for sample in sound] == expected
        assert empty(verbs)
    finally:
        engine.unload("lost")


def test_what_is_too_long_for_the_cache_is_refused_or_cut(engine: Engine):
    verbs = decoder(engine, max_cached_tokens=128)
    assert isinstance(verbs.admit([request(None, 128, 1)])[0], DatumTooLong)
    (result,) = verbs.sample([request(None, 120, 50)])
    assert isinstance(result, SampleResult)
    (sequence,) = result.sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (8, "length")


def test_weights_are_those_of_admission(engine: Engine):
    engine.create("gone", AdapterSpec(rank=2))
    perturb(engine, "gone")
    sample = request("gone", 5, 6)
    expected, verbs = alone(engine, sample), decoder(engine)
    verbs.admit([sample])
    engine.unload("gone")
    assert run(verbs, {0: []})[id(sample)] == expected


def test_nothing_to_continue_and_nothing_asked(engine: Engine):
    verbs = decoder(engine)
    assert verbs.sample([Sample(adapter=None, prompts=[])]) == [SampleResult(())]
    assert verbs.decode(1.0) == [] and verbs.decoding == 0
    (error,) = verbs.admit([replace(request(None, 3, 3), num_samples=0)])
    assert isinstance(error, DataError) and "num_samples is 0" in str(error)


def test_who_takes_over_a_slot_takes_nothing_else_over(engine: Engine):
    """Stop tokens, limits and settings are the new one's own, while another runs on."""
    verbs = decoder(engine, max_sequences=3)
    runs_on = request(None, 5, 200)
    every = replace(
        request("all", 5, 50, temperature=1.0), params=SamplingParams(stop=(*range(VOCAB),))
    )
    (stopped,) = alone(engine, every).sequences
    assert (len(stopped.tokens), stopped.stop_reason) == (1, "stop")
    after = [request("all", 9, 20, seed=seed) for seed in range(4)]
    expected = [alone(engine, sample) for sample in after]
    found = run(verbs, {0: [runs_on], 1: [every], 3: after[:2], 40: after[2:]})
    assert found[id(every)] == alone(engine, every)
    assert [found[id(sample)] for sample in after] == expected


@pytest.mark.parametrize("method", ["hidden", "logits"])
def test_a_step_that_fails_leaves_nothing_behind(engine: Engine, method: str, monkeypatch):
    """Out of memory, say, at any call: once the requests are cancelled, all room is free."""
    base, inner, calls = type(engine.base), getattr(type(engine.base), method), [0]

    def failing(*args: Any) -> Any:
        calls[0] -= 1
        if calls[0] == 0:
            raise RuntimeError("out of memory")
        return inner(*args)

    monkeypatch.setattr(base, method, failing)
    verbs = decoder(engine, max_sequences=5)
    for count in range(1, 13):
        crowd = [request(name, 30 * (n + 1), 6, 2, seed=n) for n, name in enumerate(NAMES)]
        calls[0] = count
        verbs.admit(crowd)
        with pytest.raises(RuntimeError, match="out of memory"):
            while verbs.decoding:
                verbs.decode(1.0)
        for sample in crowd:
            verbs.cancel(sample)
        assert empty(verbs)
    calls[0] = 0
    sample = request("all", 50, 5)
    assert verbs.sample([sample]) == [alone(engine, sample)]
