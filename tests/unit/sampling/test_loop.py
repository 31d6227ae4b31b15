"""Continuing prompts: Hugging Face's own greedy answers, honest log-probabilities, own streams."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manylora.engine import Engine
from manylora.types import (
    AdapterSpec,
    Datum,
    ForwardBackward,
    Opening,
    Sample,
    SampledSequence,
    SamplingParams,
)
from tests.laws.stock_peft import StockPeft
from tests.laws.tenants import must, perturb
from tests.models import FAMILIES, VOCAB

pytestmark = pytest.mark.usefixtures("threads")
PROMPTS = [[5], [6, 7, 8, 9, 10, 11, 12], [13, 14], [15] * 12]
GREEDY = SamplingParams(max_tokens=12, stop=())
SPECS = {
    "all": AdapterSpec(rank=8, alpha=32, seed=1, dropout=0.4),  # dropout is for training only
    "head": AdapterSpec(rank=3, alpha=6, targets=("o_proj", "lm_head"), seed=2),
    "half": AdapterSpec(rank=4, alpha=16, dtype="bf16", seed=3),
}


def engine_of(tiny, family: str = "llama") -> Engine:
    engine = Engine(Opening(str(tiny(family))))
    for name, spec in SPECS.items():
        engine.create(name, spec)
        perturb(engine, name)
    return engine


@pytest.fixture(scope="module")
def engine(tiny) -> Engine:
    return engine_of(tiny)


def ask(engine: Engine, adapter: str | None, params: SamplingParams) -> tuple[SampledSequence, ...]:
    (result,) = must(engine.sample([Sample(adapter=adapter, prompts=PROMPTS, params=params)]))
    return result.sequences


def greedy_by_stock(model, prompt: list[int], count: int) -> tuple[int, ...]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate_for_base_and_adapters_in_one_batch(tiny, family: str):
    engine = engine_of(tiny, family)
    names = [None, "all", "head"]
    params = replace(GREEDY, max_tokens=8)
    requests = [Sample(adapter=n, prompts=PROMPTS[:3], params=params) for n in names]
    together = [r.sequences for r in must(engine.sample(requests))]
    for name, answers in zip(names, together, strict=True):
        if name is None:
            model = AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation="eager")
        else:
            model = StockPeft(tiny(family), engine.state(name)).model
        model.eval()
        # `generate` would stop at, or be forbidden, the end token; ours ran with no stop at all.
        model.generation_config.eos_token_id = None
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            assert answer.tokens == greedy_by_stock(model, prompt, 8), (name, prompt)
            assert answer.stop_reason == "length"
    assert len({answers[0].tokens for answers in together}) > 1  # the adapters do act


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("name", [*SPECS, None])
def test_logprobs_are_those_of_forward(engine, name: str | None, temperature: float):
    """Of the temperature-scaled distribution, before top-k and top-p; at 0, of temperature 1."""
    params = replace(GREEDY, temperature=temperature, top_k=20, top_p=0.8, seed=4)
    for prompt, answer in zip(PROMPTS, ask(engine, name, params), strict=True):
        logits_NV = logits(engine, name, [*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        logprobs_NV = torch.log_softmax(logits_NV / (temperature or 1.0), dim=-1)
        expected = logprobs_NV.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=1e-4)


def logits(engine: Engine, name: str | None, tokens: list[int]) -> torch.Tensor:
    """Up to a constant: `forward`'s log-probabilities of every token at every position."""
    spare = name or "none"
    if name is None and "none" not in engine.adapters:
        engine.create("none", AdapterSpec(rank=1))  # B = 0 changes nothing
    count = len(tokens)
    data = [Datum(np.array(tokens), inputs(np.full(count, v))) for v in range(VOCAB)]
    work = ForwardBackward(adapter=spare, data=data, backward=False)
    (result,) = must(engine.forward_backward([work]))
    return torch.from_numpy(np.stack(result.logprobs, axis=1))


def inputs(targets: np.ndarray) -> dict[str, np.ndarray]:
    return {"target_tokens": targets, "weights": np.zeros(len(targets))}


def test_the_distribution_is_the_softmax(engine):
    """A thousand draws of one token, against its probabilities (χ² of the ten likeliest)."""
    count = 1000
    logprobs_V = torch.log_softmax(logits(engine, "all", [5, 5])[0] / 1.5, dim=-1)
    params = SamplingParams(max_tokens=1, temperature=1.5, stop=())
    requests = [
        Sample(adapter="all", prompts=[[5]], params=replace(params, seed=seed))
        for seed in range(count)
    ]
    drawn = Counter(r.sequences[0].tokens[0] for r in must(engine.sample(requests)))
    likeliest = logprobs_V.argsort(descending=True)[:10].tolist()
    expected = {t: count * float(logprobs_V[t].exp()) for t in likeliest}
    chi2 = sum((drawn[t] - e) ** 2 / e for t, e in expected.items())
    assert chi2 < 29.6  # p = 0.001 at ten degrees of freedom


def test_top_k_and_top_p_bound_the_support(engine):
    order = logits(engine, None, [5, 5])[0].argsort(descending=True).tolist()
    probs_V = torch.softmax(logits(engine, None, [5, 5])[0], dim=-1)

    def support(**limits: Any) -> set[int]:
        params = SamplingParams(max_tokens=1, temperature=1.0, stop=())
        requests = [
            Sample(adapter=None, prompts=[[5]], params=replace(params, seed=seed, **limits))
            for seed in range(300)
        ]
        return {r.sequences[0].tokens[0] for r in must(engine.sample(requests))}

    assert support(top_k=1) == {order[0]}
    assert support(top_k=4) == set(order[:4])
    assert support(top_p=1e-6) == {order[0]}
    sums = probs_V[order].cumsum(0)
    smallest = order[: int((sums < 0.3).sum()) + 1]  # the first that reach 0.3
    found = support(top_p=0.3)
    assert found <= set(smallest) and len(found) > len(smallest) // 2
    assert len(support()) > 40


def test_the_same_seed_gives_the_same_answer_whoever_is_there(engine):
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=7, stop=())
    alone = ask(engine, "all", params)
    assert alone == ask(engine, "all", params)
    crowd = [
        Sample(adapter=name, prompts=PROMPTS, params=replace(params, seed=7 + i, max_tokens=10 + i))
        for i, name in enumerate(["head", "all", None, "half"])
    ]
    crowd[1] = replace(crowd[1], params=params)
    beside = must(engine.sample(crowd))[1].sequences
    assert beside == alone
    other = ask(engine, "all", replace(params, seed=8))
    assert [s.tokens for s in other] != [s.tokens for s in alone]


def test_prompts_of_one_request_have_streams_of_their_own(engine):
    params = SamplingParams(max_tokens=10, temperature=1.0, stop=())
    request = Sample(adapter=None, prompts=[[5], [5], [5]], params=params)
    answers = {s.tokens for s in must(engine.sample([request]))[0].sequences}
    assert len(answers) == 3


def test_stop_tokens(engine):
    free = ask(engine, "all", GREEDY)[1].tokens
    stop = free[3]
    first = free.index(stop)
    answer = ask(engine, "all", replace(GREEDY, stop=(stop, VOCAB - 1)))[1]
    assert (answer.tokens, answer.stop_reason) == (free[: first + 1], "stop")
    assert len(answer.logprobs) == first + 1


def test_the_models_own_end_stops_unless_told_otherwise(engine, monkeypatch):
    free = ask(engine, None, GREEDY)[0].tokens
    monkeypatch.setattr(engine.base, "eos_token_ids", (free[2],))
    first = free.index(free[2])
    assert ask(engine, None, replace(GREEDY, stop=None))[0].tokens == free[: first + 1]
    assert ask(engine, None, GREEDY)[0].tokens == free


def test_the_contexts_end_ends_an_answer(engine):
    long = Sample(adapter=None, prompts=[[3] * 125, [3]], params=replace(GREEDY, max_tokens=9))
    one, two = must(engine.sample([long]))[0].sequences
    assert (len(one.tokens), one.stop_reason) == (3, "length")
    assert len(two.tokens) == 9


def test_answers_come_in_the_order_of_the_prompts(engine):
    whole = ask(engine, "head", GREEDY)
    for prompt, answer in zip(PROMPTS, whole, strict=True):
        single = Sample(adapter="head", prompts=[prompt], params=GREEDY)
        assert must(engine.sample([single]))[0].sequences == (answer,)
