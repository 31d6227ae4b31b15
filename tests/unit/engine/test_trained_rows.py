"""The head on the rows that somebody asks for: the same numbers, fewer of them, for less.

Faults that were planted and seen to fail here: rows in another order than their targets; further
targets of the rows that are left out; a gradient scattered to the wrong rows; a ratio over the rows
that are only read; trained rows and others in one chunk; rows that are only read without their
adapter on the head, or with the place of trained ones; a position with a second target's weight
alone, or with a place in the ratio's mask alone, taken for untrained; zeros for what was not asked.

N tokens of a datum, n of them trained, K targets of each position.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from manylora.engine import Engine
from manylora.engine.head_rows import head_rows
from manylora.engine.plan import Piece
from manylora.engine.reference import ReferenceEngine, trained_rows
from manylora.losses import get_loss
from manylora.types import (
    AdapterSpec,
    DataError,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    Opening,
    Wanted,
)
from tests.laws.tenants import LOSSES, must, perturb, random_data, thinned, work_of
from tests.laws.test_cost_follows_tokens import flops

pytestmark = pytest.mark.usefixtures("threads")
SPECS = {
    "all": AdapterSpec(rank=3, seed=1),
    "head": AdapterSpec(rank=5, targets=("q_proj", "lm_head"), seed=2),
    "dropped": AdapterSpec(rank=2, targets=("o_proj", "lm_head"), dropout=0.2, seed=3),
    "beside": AdapterSpec(rank=2, targets=("o_proj",), seed=4),
}
Outcome = tuple[ForwardBackwardResult, torch.Tensor]
TOLERANCE = 1e-5


@pytest.fixture(params=["whole", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `chunks` the head works on 32 rows at a time, which end inside data."""
    if request.param == "chunks":
        monkeypatch.setattr("manylora.engine.head_loss.chunk_rows", lambda *_, **__: 32)


def engine_of(base: Path) -> Engine:
    engine = Engine(Opening(str(base), token_budget=512))
    for name, spec in SPECS.items():
        engine.create(name, spec)
        perturb(engine, name)
    return engine


def work_for(name: str, loss: str, wanted: Wanted = "all") -> ForwardBackward:
    """Two thirds of the positions are not trained."""
    rng = np.random.default_rng(len(name))
    data = thinned(rng, random_data(rng, 3, loss, (15, 60)), 0.66)
    return replace(work_of(name, loss, data), logprobs=wanted)


def run(engine: Engine, *works: ForwardBackward) -> Outcome:
    """The result and the gradient of the first one; every call begins at the same random stream."""
    for adapter in engine.adapters.values():
        adapter.drop_grad()
        adapter.draws = 0
    result = must(engine.forward_backward(works))[0]
    return result, engine.adapters[str(works[0].adapter)].require_grad().clone()


def beside(own: ForwardBackward) -> Iterator[ForwardBackward]:
    """Work of the others by every loss, of which some want to read everything and some do not."""
    yield own
    for name in SPECS:
        for number, loss in enumerate(LOSSES):
            if name != own.adapter:
                yield work_for(name, loss, "all" if number % 2 else "trained")


@pytest.mark.parametrize("name", ["all", "head", "dropped"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("chunks")
def test_the_numbers_do_not_depend_on_what_is_read(tiny, loss: str, name: str):
    engine = engine_of(tiny("gemma2"))
    work = work_for(name, loss)
    everything, gradient_P = run(engine, work)
    assert everything.positions is None and gradient_P.any()
    trained = replace(work, logprobs="trained")
    for works in ([trained], beside(trained), beside(work)):
        result, found_P = run(engine, *works)
        assert result.loss == everything.loss
        assert torch.equal(found_P, gradient_P)
        if result.positions is None:
            assert all(map(np.array_equal, result.logprobs, everything.logprobs))
            continue
        for datum, rows_n, own, whole in zip(
            work.data, result.positions, result.logprobs, everything.logprobs, strict=True
        ):
            inputs = {key: torch.from_numpy(value) for key, value in datum.loss_inputs.items()}
            assert np.array_equal(rows_n, trained_rows(work.loss, inputs).numpy())
            assert 0 < len(rows_n) < len(datum) or loss == "dro"
            assert own.shape == (len(rows_n), *whole.shape[1:])
            assert np.array_equal(own, whole[rows_n])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("chunks")
def test_they_are_those_of_the_reference(tiny, loss: str):
    engine = engine_of(tiny("llama"))
    choices: tuple[Wanted, ...] = ("trained", "all")
    for choice in choices:
        work = work_for("head", loss, choice)
        result, found_P = run(engine, *beside(work))
        oracle = ReferenceEngine(tiny("llama"), engine.state("head"))
        expected, total = oracle.forward_backward(work.data, work.loss, work.config, choice)
        for found, wanted in zip(result.logprobs, expected, strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=TOLERANCE)
        # Of terms with either sign: what they differ by does not shrink with their sum.
        assert result.loss == pytest.approx(total, rel=TOLERANCE, abs=TOLERANCE)
        expected_P = oracle.gradient()
        assert (found_P - expected_P).norm() <= TOLERANCE * expected_P.norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_forward_alone_gives_the_same(tiny, loss: str):
    engine = engine_of(tiny("llama"))
    work = work_for("head", loss, "trained")
    expected, _ = run(engine, *beside(work))
    result, nothing_P = run(engine, replace(work, backward=False))
    assert result.loss == expected.loss
    assert all(map(np.array_equal, result.logprobs, expected.logprobs))
    assert not nothing_P.any()


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "gspo"])
def test_an_untrained_position_has_no_loss_whatever_its_log_probability(name: str):
    rng = np.random.default_rng(0)
    (datum,) = thinned(rng, random_data(rng, 1, name, (40, 41)), 0.5)
    loss = get_loss(name)
    untrained_N = ~loss.trained(datum)
    assert 0 < untrained_N.sum() < len(datum)
    inputs = {k: torch.from_numpy(v) for k, v in datum.loss_inputs.items()}
    outcomes = []
    for scale in (1.0, 2.0):
        logprobs_N = torch.full((len(datum),), -3.0)
        logprobs_N[torch.from_numpy(untrained_N)] *= scale
        made = {k: f(logprobs_N, inputs, [len(datum)]) for k, f in loss.sequence_inputs.items()}
        outcomes.append(loss.function(logprobs_N, {**inputs, **made}, loss.settings(LOSSES[name])))
        for values_N in outcomes[-1]:
            assert not values_N[torch.from_numpy(untrained_N)].any()
            assert values_N.any()
    for one_N, other_N in zip(*outcomes, strict=True):
        assert torch.equal(one_N, other_N)


def test_dro_trains_every_position():
    rng = np.random.default_rng(0)
    (datum,) = thinned(rng, random_data(rng, 1, "dro", (40, 41)), 0.5)
    assert get_loss("dro").trained(datum).all()


def test_one_weight_of_several_is_enough():
    weights = np.array([[0.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -0.0]])
    datum = Datum(np.arange(4), {"target_tokens": np.ones((4, 2), int), "weights": weights})
    assert get_loss("cross_entropy").trained(datum).tolist() == [False, True, True, False]


def test_where_nothing_is_trained_nothing_comes_back(tiny):
    engine = engine_of(tiny("llama"))
    rng = np.random.default_rng(0)
    one, two = random_data(rng, 2, lengths=(9, 10))
    inputs = {**one.loss_inputs, "weights": np.zeros(9)}
    empty = replace(one, loss_inputs=inputs)
    work = ForwardBackward(adapter="head", data=[empty, two], logprobs="trained")
    result, _ = run(engine, work)
    assert result.positions is not None
    assert [rows_n.tolist() for rows_n in result.positions] == [[], list(range(9))]
    assert [own_n.shape for own_n in result.logprobs] == [(0,), (9,)]
    result, nothing_P = run(engine, replace(work, data=[empty]))
    assert result.loss == 0.0 and result.logprobs[0].shape == (0,)
    assert not nothing_P.any()


def test_the_head_is_paid_for_where_it_is_asked(tiny):
    engine = engine_of(tiny("llama"))
    rng = np.random.default_rng(0)
    inputs: dict[str, Any] = {"target_tokens": rng.integers(0, 9, 128), "weights": np.zeros(128)}
    inputs["weights"][-32:] = 1.0
    datum = Datum(rng.integers(0, 9, 128), inputs)
    full = replace(datum, loss_inputs={**inputs, "weights": np.ones(128)})
    head = 2 * engine.base.head.weight_VH.numel()

    def cost(one: Datum, wanted: Wanted, backward: bool = True) -> int:
        work = ForwardBackward(adapter="all", data=[one], backward=backward, logprobs=wanted)
        return flops(lambda: must(engine.forward_backward([work])))

    def ratios(wanted: Wanted) -> int:
        marks = inputs["weights"]
        of_gspo = {"advantages": marks, "logprobs": marks - 5.0, "sequence_ratio_mask": marks}
        one = Datum(datum.tokens, {"target_tokens": inputs["target_tokens"], **of_gspo})
        work = replace(work_of("all", "gspo", [one]), logprobs=wanted)
        return flops(lambda: must(engine.forward_backward([work])))

    most = cost(full, "all")
    assert cost(full, "trained") == most
    # Rows that are only read take no gradient; rows that nobody asks for take nothing.
    assert cost(datum, "all") == most - 96 * head
    assert cost(datum, "trained") == most - 2 * 96 * head
    # A ratio is made of trained rows.
    assert ratios("all") == cost(datum, "all") + 32 * head
    assert ratios("trained") == cost(datum, "trained") + 32 * head
    assert cost(datum, "trained", False) == cost(datum, "all", False) - 96 * head


def test_rows_of_a_piece_with_an_adapter_on_the_head_have_chunks_of_their_own():
    """Three pieces of 70, 40 and 10 trained rows, and of 5, 50 and 0 that are read."""
    loss = get_loss("cross_entropy")
    pieces, starts, row = [], [], 0
    for number, (trained, read) in enumerate([(70, 5), (40, 50), (10, 0)]):
        count = trained + read
        weights = np.r_[np.ones(trained), np.zeros(read)]
        datum = Datum(
            np.zeros(count, int), {"target_tokens": np.zeros(count, int), "weights": weights}
        )
        pieces.append(Piece(0, "a", number, [datum], count))
        starts.append(row)
        row += count
    rows = head_rows(pieces, starts, [(loss, {})], torch.device("cpu"))
    assert (rows.total, rows.trained[-1][1]) == (175, 120)
    assert rows.rows_L.tolist() == [
        *range(70),
        *range(75, 115),
        *range(165, 175),
        *range(70, 75),
        *range(115, 165),
    ]
    found = [(c.start, c.stop, c.trained, c.piece, c.within) for c in rows.chunks({1}, 32)]
    assert found == [
        (0, 32, True, None, 0),
        (32, 64, True, None, 32),
        (64, 70, True, None, 64),
        (70, 102, True, 1, 0),
        (102, 110, True, 1, 32),
        (110, 120, True, None, 0),
        (120, 125, False, None, 0),
        (125, 157, False, 1, 40),
        (157, 175, False, 1, 72),
    ]
    assert list(head_rows([], [], [], torch.device("cpu")).chunks((), 32)) == []


def test_another_word_is_refused(tiny):
    engine = engine_of(tiny("llama"))
    work = replace(work_for("all", "cross_entropy"), logprobs=cast(Wanted, "some"))
    (outcome,) = engine.forward_backward([work])
    assert isinstance(outcome, DataError)
    assert "adapter 'all': logprobs is 'some'; it is one of all, trained" in str(outcome)
