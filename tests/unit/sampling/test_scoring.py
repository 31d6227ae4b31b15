"""What is reported beside the answer, against a plain forward of the whole model.

M tokens of the prompt, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manylora.engine import Engine
from manylora.sampling import scoring
from manylora.types import (
    AdapterSpec,
    DataError,
    NotFinite,
    Opening,
    PromptScores,
    Sample,
    SampleResult,
    SamplingParams,
    Scoring,
)
from tests.laws.stock_peft import StockPeft
from tests.laws.tenants import must, perturb
from tests.models import VOCAB

pytestmark = pytest.mark.usefixtures("threads")
PROMPT = np.random.default_rng(0).integers(3, VOCAB, 90)
CLOSE = {"atol": 1e-4, "rtol": 0}
SPECS = {
    "all": AdapterSpec(rank=8, alpha=32, seed=1),
    "head": AdapterSpec(rank=3, alpha=6, targets=("o_proj", "lm_head"), seed=2),
}


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def engine(request: pytest.FixtureRequest, tiny) -> Engine:
    engine = Engine(
        Opening(str(tiny(request.param)), token_budget=40)
    )  # the prompt is read in pieces
    for name, spec in SPECS.items():
        engine.create(name, spec)
        perturb(engine, name)
    return engine


def reference(engine: Engine, name: str | None, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities [M, V] after each token, by PEFT or the bare model, without a cache."""
    folder = engine.base.folder
    if name is None:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    else:
        model = StockPeft(folder, engine.state(name)).model  # type: ignore[arg-type]
    with torch.no_grad():
        logits_MV = model.eval()(input_ids=torch.from_numpy(tokens)[None]).logits[0]
    return torch.log_softmax(logits_MV.float(), dim=-1).numpy()


def ask(engine: Engine, name: str | None, wanted: Scoring, **settings: Any) -> SampleResult:
    params = replace(SamplingParams(max_tokens=3, stop=()), **settings)
    sample = Sample(adapter=name, prompts=[PROMPT], params=params, scoring=wanted)
    (result,) = must(engine.sample([sample]))
    return result


def scores(engine: Engine, name: str | None, wanted: Scoring) -> PromptScores:
    (found,) = ask(engine, name, wanted).prompts
    return found


@pytest.mark.parametrize("rows", [None, 32])
@pytest.mark.parametrize("name", [None, *SPECS])
def test_the_prompts_own_tokens(engine: Engine, name: str | None, rows, monkeypatch):
    """In pieces of the prompt, and of the piece where few logits fit at a time."""
    if rows:
        monkeypatch.setattr(engine.decoder.loop, "_logits_rows", rows)
    expected_MV = reference(engine, name, PROMPT)
    found_M = scores(engine, name, Scoring(prompt=True)).logprobs
    assert found_M.shape == PROMPT.shape and np.isnan(found_M[0])
    np.testing.assert_allclose(found_M[1:], expected_MV[np.arange(89), PROMPT[1:]], **CLOSE)


@pytest.mark.parametrize("count", [0, 1, 40, 50, 89, 90, 500])
def test_only_the_last_tokens(engine: Engine, count: int):
    whole_M = scores(engine, "all", Scoring(prompt=True)).logprobs
    wanted = Scoring(prompt=True, prompt_last_n=count, topk_prompt=2)
    found = scores(engine, "all", wanted)
    scored = min(count, 89)
    assert np.isnan(found.logprobs[: 90 - scored]).all()
    np.testing.assert_array_equal(found.logprobs[90 - scored :], whole_M[90 - scored :])
    assert found.topk is not None
    assert (found.topk.tokens[: 90 - scored] == 0).all()
    assert (found.topk.logprobs[: 90 - scored] == -99999.0).all()
    assert (found.topk.logprobs[90 - scored :] > -99.0).all()


@pytest.mark.parametrize("name", [None, *SPECS])
def test_the_likeliest_tokens_of_the_prompt(engine: Engine, name: str | None):
    expected_MV = reference(engine, name, PROMPT)
    found = scores(engine, name, Scoring(topk_prompt=5))
    assert np.isnan(found.logprobs).all()  # nothing of the tokens themselves was asked
    assert found.topk is not None and found.topk.tokens.shape == (90, 5)
    assert found.topk.tokens.dtype == np.int32
    best_M5 = np.sort(expected_MV, axis=1)[:-1, ::-1][:, :5]
    np.testing.assert_allclose(found.topk.logprobs[1:], best_M5, **CLOSE)
    own = np.take_along_axis(expected_MV[:-1], found.topk.tokens[1:].astype(int), axis=1)
    np.testing.assert_allclose(own, best_M5, **CLOSE)


def test_candidates_of_each_place(engine: Engine):
    rng = np.random.default_rng(1)
    candidates = rng.integers(-1, VOCAB, (89, 4))
    candidates[3] = -1
    expected_MV = reference(engine, "head", PROMPT)
    # Asked for everywhere, whatever `prompt_last_n` says of the tokens themselves.
    wanted = Scoring(candidates=candidates, prompt=True, prompt_last_n=5)
    found = scores(engine, "head", wanted)
    own = np.take_along_axis(expected_MV[:-1], np.maximum(candidates, 0), axis=1)
    own[candidates < 0] = np.nan
    assert found.candidates is not None
    np.testing.assert_allclose(found.candidates, own, **CLOSE)
    assert np.isfinite(found.logprobs).sum() == 5


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_likeliest_tokens_of_the_answer(engine: Engine, temperature: float):
    """Of the same distribution as the answer's own log-probabilities."""
    wanted = Scoring(topk_sampled=4)
    result = ask(engine, "all", wanted, max_tokens=8, temperature=temperature, top_k=3)
    (sequence,) = result.sequences
    assert result.prompts == () and sequence.topk is not None
    assert sequence.topk.tokens.shape == sequence.topk.logprobs.shape == (8, 4)
    logprobs_MV = reference(engine, "all", np.concatenate([PROMPT, sequence.tokens]))[89:-1]
    scaled_MV = torch.log_softmax(torch.from_numpy(logprobs_MV) / (temperature or 1.0), -1).numpy()
    best = np.sort(scaled_MV, axis=1)[:, ::-1][:, :4]
    np.testing.assert_allclose(sequence.topk.logprobs, best, **CLOSE)
    chosen = scaled_MV[np.arange(8), list(sequence.tokens)]
    np.testing.assert_allclose(sequence.logprobs, chosen, **CLOSE)
    for token, row in zip(sequence.tokens, sequence.topk.tokens, strict=True):
        assert token in row  # it was drawn from the three likeliest


def test_one_token_prompts_and_several_prompts(engine: Engine):
    sample = Sample(
        adapter="all",
        prompts=[PROMPT[:1], PROMPT[:33]],
        params=SamplingParams(max_tokens=1),
        num_samples=2,
        scoring=Scoring(prompt=True, topk_prompt=1),
    )
    (result,) = must(engine.sample([sample]))
    assert [len(s.logprobs) for s in result.prompts] == [1, 33]
    assert np.isnan(result.prompts[0].logprobs).all() and len(result.sequences) == 4
    whole = scores(engine, "all", Scoring(prompt=True)).logprobs[:33]
    np.testing.assert_allclose(result.prompts[1].logprobs, whole, atol=1e-5)


def test_scores_do_not_depend_on_neighbours(engine: Engine):
    wanted = Scoring(prompt=True, topk_prompt=3, candidates=np.full((89, 1), 7))
    sample = Sample(adapter="head", prompts=[PROMPT], scoring=wanted)
    alone = must(engine.sample([sample]))[0].prompts[0]
    crowd = [replace(sample, adapter=name) for name in (None, "all", "head", None)]
    for number, found in enumerate(must(engine.sample(crowd))):
        same = found.prompts[0]
        if number == 2:
            np.testing.assert_array_equal(same.logprobs, alone.logprobs)
            np.testing.assert_array_equal(same.topk.logprobs, alone.topk.logprobs)
            np.testing.assert_array_equal(same.candidates, alone.candidates)


def test_no_more_logits_than_said(engine: Engine, monkeypatch):
    rows = []
    inner = engine.base.logits
    monkeypatch.setattr(
        type(engine.base), "logits", lambda _, h: (rows.append(len(h)), inner(h))[1]
    )
    monkeypatch.setattr(engine.decoder.loop, "_logits_rows", 32)
    ask(engine, "head", Scoring(prompt=True))
    assert max(rows) == 32 and len(rows) >= 3
    assert scoring.logits_rows(1 << 17) == 32 and scoring.logits_rows(2816) == 1472


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Scoring(topk_prompt=VOCAB + 1), "topk_prompt is 161"),
        (Scoring(topk_sampled=-1), "topk_sampled is -1"),
        (Scoring(prompt_last_n=-1), "prompt_last_n is -1"),
        (Scoring(candidates=np.zeros((90, 1), int)), r"needs \[89, any\]"),
        (Scoring(candidates=np.zeros(89, int)), r"needs \[89, any\]"),
        (Scoring(candidates=np.full((89, 1), VOCAB)), "candidates must be token ids"),
        (Scoring(candidates=np.full((89, 1), 0.5)), "candidates must be token ids"),
    ],
)
def test_what_cannot_be_scored(engine: Engine, wanted: Scoring, words: str):
    (error,) = engine.sample([Sample(adapter=None, prompts=[PROMPT], scoring=wanted)])
    assert isinstance(error, DataError)
    with pytest.raises(DataError, match=words):
        raise error
    assert not engine.decoding


def test_a_prompt_that_overflows_is_an_error(engine: Engine):
    engine.create("lost", AdapterSpec(rank=2))
    engine.adapters["lost"].master_P.fill_(torch.nan)
    sample = Sample(adapter="lost", prompts=[PROMPT], scoring=Scoring(prompt=True))
    (error,) = engine.sample([sample])
    engine.unload("lost")
    assert isinstance(error, NotFinite) and engine.decoder.loop._cache.used_tokens == 0
