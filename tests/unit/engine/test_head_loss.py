"""Every loss through the engine: beside plain autograd, in company, and with any number of targets.

Faults that were planted and seen to fail here: further targets without their part of the softmax's
gradient, not normalised, left out of the loss, or read from another chunk; a token named twice that
counts once; a sequence's ratio over the whole stream, over all its tokens, of single tokens, or
without the chunks that it shares; one loss's slope for all rows of a stream.

N tokens of a datum, K targets of each position, P parameters of an adapter.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manylora.engine import Engine
from manylora.engine.reference import ReferenceEngine
from manylora.types import AdapterSpec, Datum, ForwardBackward, ForwardBackwardResult, Opening
from tests.laws.tenants import LOSSES, must, perturb, random_data, work_of
from tests.models import VOCAB

pytestmark = pytest.mark.usefixtures("threads")
SPECS = {
    "all": AdapterSpec(rank=3, seed=1),
    # Nothing on the head either, so chunks hold rows of both.
    "beside": AdapterSpec(rank=2, targets=("o_proj",), seed=4),
    "head": AdapterSpec(rank=5, targets=("q_proj", "lm_head"), seed=2),
    "only-head": AdapterSpec(rank=2, targets=("lm_head",), seed=3),
}
Outcome = tuple[ForwardBackwardResult, torch.Tensor]
TOLERANCE = 1e-5
CAPPED = "gemma2"  # this family caps its logits
SCALED = "cohere"  # and this one multiplies them


@pytest.fixture(params=["whole", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `chunks` the head works on 32 rows at a time, which end inside data."""
    if request.param == "chunks":
        monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, **__: 32)


def crowd(base: Path, **options: Any) -> Engine:
    engine = Engine(Opening(str(base), **options))
    for name, spec in SPECS.items():
        engine.create(name, spec)
        perturb(engine, name)
    return engine


def works_of(name: str) -> dict[str, ForwardBackward]:
    """Work by each loss."""
    rng = np.random.default_rng(len(name))
    return {loss: work_of(name, loss, random_data(rng, 2, loss, (15, 40))) for loss in LOSSES}


def run(engine: Engine, *works: ForwardBackward) -> Outcome:
    """The result and the gradient of the first one."""
    for adapter in engine.adapters.values():
        adapter.drop_grad()
    result = must(engine.forward_backward(works))[0]
    return result, engine.adapters[str(works[0].adapter)].require_grad().clone()


def in_company(own: ForwardBackward) -> Iterator[ForwardBackward]:
    """With work of the other adapters, by every loss."""
    yield own
    for name in SPECS:
        if name != own.adapter:
            yield from works_of(name).values()


def assert_same(one: Outcome, other: Outcome) -> None:
    """Results and gradients have the same bits."""
    assert one[0].loss == other[0].loss
    assert all(map(np.array_equal, one[0].logprobs, other[0].logprobs))
    assert torch.equal(one[1], other[1])
    assert one[1].any()


@pytest.mark.parametrize("name", ["all", "head", "only-head"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", ["llama", CAPPED, SCALED])
@pytest.mark.usefixtures("chunks")
def test_in_company_each_loss_is_autograds_and_its_own(tiny, family: str, loss: str, name: str):
    engine = crowd(tiny(family), token_budget=512)
    work = works_of(name)[loss]
    result, found_P = run(engine, *in_company(work))
    assert_same((result, found_P), run(engine, work))

    oracle = ReferenceEngine(tiny(family), engine.state(name))
    expected, total = oracle.forward_backward(work.data, work.loss, work.config)
    for found, wanted in zip(result.logprobs, expected, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=TOLERANCE)
    assert result.loss == result.metrics["loss:sum"] == pytest.approx(total, rel=TOLERANCE)
    expected_P = oracle.gradient()
    assert (found_P - expected_P).norm() <= TOLERANCE * expected_P.norm()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("chunks")
def test_forward_alone_gives_the_same_and_leaves_nothing(tiny, loss: str):
    engine = crowd(tiny("llama"))
    work = works_of("head")[loss]
    expected, gradient_P = run(engine, *in_company(work))
    result, nothing_P = run(engine, replace(work, backward=False))
    assert result.loss == expected.loss
    assert all(map(np.array_equal, result.logprobs, expected.logprobs))
    assert gradient_P.any() and not nothing_P.any()


# --- several targets --------------------------------------------------------------------------


def distil(data: list[tuple[Any, Any]]) -> ForwardBackward:
    """Work of `head` on data of some targets and weights; the tokens are always the same."""
    rng = np.random.default_rng(0)
    return ForwardBackward(
        adapter="head",
        data=[
            Datum(
                rng.integers(0, VOCAB, len(targets)),
                {"target_tokens": np.array(targets), "weights": np.array(weights)},
            )
            for targets, weights in data
        ],
    )


def plain(rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, VOCAB, rows), rng.normal(size=rows)


@pytest.mark.parametrize("family", ["llama", CAPPED, SCALED])
@pytest.mark.usefixtures("chunks")
def test_one_of_one_is_one(tiny, family: str):
    """[N, 1] has the bits of [N], and its own shape; so has [N, K] whose others weigh nothing."""
    engine = crowd(tiny(family))
    targets_N, weights_N = plain()
    expected = run(engine, distil([(targets_N, weights_N)]))
    result, gradient_P = run(engine, distil([(targets_N[:, None], weights_N[:, None])]))
    assert result.logprobs[0].shape == (40, 1)
    assert result.loss == expected[0].loss
    assert np.array_equal(result.logprobs[0][:, 0], expected[0].logprobs[0])
    assert torch.equal(gradient_P, expected[1])

    targets_NK, weights_NK = np.zeros((40, 4), np.int64), np.zeros((40, 4))
    targets_NK[:, 0], weights_NK[:, 0] = targets_N, weights_N
    result, gradient_P = run(engine, distil([(targets_NK, weights_NK)]))
    assert result.loss == expected[0].loss
    assert np.array_equal(result.logprobs[0][:, 0], expected[0].logprobs[0])
    assert torch.equal(gradient_P, expected[1])


@pytest.mark.usefixtures("chunks")
def test_a_token_named_twice_counts_twice(tiny):
    engine = crowd(tiny("llama"))
    targets_N, weights_N = plain()
    expected, expected_P = run(engine, distil([(targets_N, weights_N)]))
    for shares in ([0.25, 0.75], [0.5, 1.5, -1.0]):
        targets_NK = np.repeat(targets_N[:, None], len(shares), axis=1)
        work = distil([(targets_NK, weights_N[:, None] * shares)])
        result, found_P = run(engine, work)
        assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert all(np.array_equal(x, expected.logprobs[0]) for x in result.logprobs[0].T)
        assert (found_P - expected_P).norm() <= TOLERANCE * expected_P.norm()


def test_more_targets_than_words(tiny):
    rng = np.random.default_rng(2)
    work = distil([(rng.integers(0, VOCAB, (7, 1024)), rng.normal(size=(7, 1024))), plain(5)])
    engine = crowd(tiny(CAPPED))
    result, found_P = run(engine, work)
    oracle = ReferenceEngine(tiny(CAPPED), engine.state("head"))
    expected, total = oracle.forward_backward(work.data)
    assert [x.shape for x in result.logprobs] == [(7, 1024), (5,)]
    for found, wanted in zip(result.logprobs, expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=TOLERANCE)
    assert result.loss == pytest.approx(total, rel=TOLERANCE)
    assert (found_P - oracle.gradient()).norm() <= TOLERANCE * oracle.gradient().norm()


# --- the ratio of a sequence ------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 64, 4096])
@pytest.mark.usefixtures("chunks")
def test_a_sequences_ratio_does_not_depend_on_the_cut(tiny, budget: int):
    """A datum longer than a piece and than a chunk still has one ratio."""
    engine = crowd(tiny(CAPPED), token_budget=budget)
    rng = np.random.default_rng(3)
    work = work_of("head", "gspo", random_data(rng, 4, "gspo", (90, 120)))
    result, found_P = run(engine, *in_company(work))
    oracle = ReferenceEngine(tiny(CAPPED), engine.state("head"))
    _, total = oracle.forward_backward(work.data, work.loss, work.config)
    assert result.loss == pytest.approx(total, rel=TOLERANCE)
    assert (found_P - oracle.gradient()).norm() <= TOLERANCE * oracle.gradient().norm()


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_the_tests_above_have_tokens_on_both_sides_of_the_clip(tiny, loss: str):
    engine = crowd(tiny("llama"))
    work = works_of("head")[loss]
    unbounded = {"clip_low_threshold": 0.0, "clip_high_threshold": 1e9}
    clipped_P, free_P = (run(engine, w)[1] for w in (work, replace(work, config=unbounded)))
    assert clipped_P.any()
    assert (clipped_P - free_P).norm() > 0.01 * free_P.norm()
