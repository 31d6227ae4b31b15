"""The optimizer's one pass on a mesh, against sums written down plainly; and what it sends.

Faults that were planted and seen to fail here: shares added up in the order of the ranks, factors
that are whole everywhere added up over tp, bytes of several dtypes end to end as they come, results
that stay on their rank, a rank that refuses alone, passes that lose their last adapter.
"""

from typing import Any

import numpy as np
import pytest
import torch

from manylora.engine import Engine, stepping
from manylora.optim import PendingStep, norms, publish, reduced
from manylora.parallel import Mesh
from manylora.types import AdamParams, AdapterSpec, NotFinite, Opening, OptimStep, StepRefused
from tests.laws.tenants import must, random_data, work_of
from tests.parallel.processes import RankFailed, run_ranks
from tests.parallel.training import assert_replicas

SHAPES = ["dp=2", "dp=3", "tp=2", "dp=2,tp=2", "dp=4", "tp=4"]
FOUR = {"num_key_value_heads": 4}
# L, numbers that every tp rank has a term of, ranges of these that are complete on each of them.
VECTORS: list[tuple[int, int, list[list[int]]]] = [
    (64, 40, []),
    (37, 20, [[3, 9], [18, 20]]),
    (5, 5, []),
    (1, 0, []),
    (50, 0, []),
]


def term(number: int, share: int, tp_index: int, length: int) -> torch.Tensor:
    """One rank's term of a gradient; of such sizes that another order of addition shows."""
    generator = torch.Generator().manual_seed(100 * number + 10 * share + tp_index)
    return torch.randn(length, generator=generator) * 10.0 ** (3 * (share % 2))


def lane(number: int, share: int, tp_index: int) -> torch.Tensor:
    length, _, repeated = VECTORS[number]
    own_L = term(number, share, tp_index, length)
    for start, stop in repeated:
        own_L[start:stop] = term(number, share, 0, length)[start:stop]
    return own_L


def passed(mesh: Mesh, homes: list[int], shares: list[int]) -> Any:
    """Run the pass over all vectors; each rank's slices, the norms, and published weights."""
    due = []
    for number, (length, whole, repeated) in enumerate(VECTORS):
        share = (mesh.dp.index - homes[number]) % mesh.dp.size
        own_L = lane(number, share, mesh.tp.index) if share < shares[number] else None
        ranks = [
            (homes[number] + s) % mesh.dp.size for s in range(min(shares[number], mesh.dp.size))
        ]
        spans = [(a, b) for a, b in repeated]
        size = -(-length // mesh.dp.size)
        due.append(PendingStep(own_L, length, size, ranks, whole, spans))
    slices = reduced(due, mesh, torch.device("cpu"))
    found = norms(due, slices, mesh)
    living = [torch.zeros(one.length, dtype=DTYPES[i % 3]) for i, one in enumerate(due)]
    if mesh.dp.size > 1:
        publish(slices, living, [one.slice_size for one in due], mesh.dp)
    return {
        "slices": [one.numpy() for one in slices],
        "norms": np.array(found),
        "living": [one.float().numpy() for one in living],
    }


DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def summed(number: int, shares: int, tp: int, index: int) -> torch.Tensor:
    """The oracle: what tp rank `index` has of a gradient in the end."""
    length, whole, repeated = VECTORS[number]
    by_tp = []
    for other in range(tp):
        total_L = torch.zeros(length)
        for share in range(shares):
            total_L = total_L + lane(number, share, other)
        by_tp.append(total_L)
    total_L = by_tp[index].clone()
    total_L[:whole] = 0.0
    for other_L in by_tp:
        total_L[:whole] += other_L[:whole]
    for start, stop in repeated:
        total_L[start:stop] = by_tp[0][start:stop]
    return total_L


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_in_the_order_of_the_shares_and_norms_of_single_numbers(shape: str):
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in shape.split(","))}
    dp, tp = sizes.get("dp", 1), sizes.get("tp", 1)
    shares = [dp, max(1, dp - 1), dp, 1, dp]
    for homes in ([0] * len(VECTORS), [n % dp for n in range(1, 1 + len(VECTORS))]):
        ranks = run_ranks(passed, shape, homes, shares)
        for number, (length, whole, _) in enumerate(VECTORS):
            expected = [summed(number, shares[number], tp, index).numpy() for index in range(tp)]
            square = 0.0
            for index in range(tp):
                parts = [ranks[d * tp + index]["slices"][number] for d in range(dp)]
                found_L = np.concatenate(parts)
                assert len(found_L) == length
                # To the bit where the order of addition is one.
                assert np.array_equal(found_L[whole:], expected[index][whole:])
                if tp <= 2:
                    assert np.array_equal(found_L, expected[index])
                np.testing.assert_allclose(found_L, expected[index], rtol=1e-5, atol=1e-3)
                own = expected[index] if index == 0 else expected[index][whole:]
                square += np.sum(own.astype(np.float64) ** 2)
                for d in range(dp if dp > 1 else 0):
                    living_L = ranks[d * tp + index]["living"][number]
                    rounded = torch.from_numpy(found_L).to(DTYPES[number % 3]).float().numpy()
                    assert np.array_equal(living_L, rounded)
            for rank in ranks:
                assert rank["norms"][number] == pytest.approx(square**0.5, rel=1e-6)
                assert rank["norms"][number] == ranks[0]["norms"][number]


PARAMS = AdamParams(lr=1e-3, clip_norm=1.0)


def opened(mesh: Mesh, folder: str, count: int) -> Engine:
    """So many adapters, each with a pending gradient."""
    engine = Engine(Opening(str(folder), token_budget=64, device="cpu"), mesh)
    rng = np.random.default_rng(0)
    works = []
    for number in range(count):
        engine.create(f"a{number}", AdapterSpec(rank=2, seed=number, init="gaussian"))
        works.append(work_of(f"a{number}", "cross_entropy", random_data(rng, 4)))
    must(engine.forward_backward(works))
    return engine


def steps_of(names: list[str]) -> list[OptimStep]:
    return [OptimStep(adapter=name, params=PARAMS) for name in names]


def traffic(mesh: Mesh, folder: str) -> Any:
    """What a step sends: of one adapter beside five others, of all six, and of a poisoned one."""
    engine = opened(mesh, folder, 6)
    found: dict[str, Any] = {}
    engine.poison("a5", "bad data")
    for what, names in (
        ("one", ["a0"]),
        ("four", ["a1", "a2", "a3", "a4"]),
        ("poisoned", ["a5", "nobody"]),
    ):
        mesh.traffic.clear()
        outcomes = engine.optim_step(steps_of(names))
        found[what] = {name: [sent.calls, sent.bytes] for name, sent in mesh.traffic.sent().items()}
        if what != "poisoned":
            must(outcomes)
    assert isinstance(outcomes[0], StepRefused)
    adapter = engine.adapters["a0"]
    found["held"] = [adapter.num_bytes(), adapter.part.local.num_params]
    return found


@pytest.mark.parametrize("shape", ["dp=2", "tp=2", "dp=2,tp=2", "dp=4"])
def test_what_is_sent_does_not_grow_with_the_number_of_adapters(tiny, shape: str):
    for rank in run_ranks(traffic, shape, str(tiny("llama", **FOUR))):
        one, four = rank["one"], rank["four"]
        assert rank["poisoned"] == {}
        assert one.keys() == four.keys()
        for name in one:
            assert one[name][0] == four[name][0], name
            assert four[name][1] <= 4 * one[name][1] + 64, name
        dp = "dp" in shape
        assert ("dp.exchange" in one) == dp and ("dp.gather" in one) == dp
        assert ("tp.sum" in one) == ("tp" in shape)
        assert sum(calls for calls, _ in one.values()) == 1 + 2 * dp + ("tp" in shape)
        num_bytes, local = rank["held"]
        slices = {"dp=2": 2, "dp=2,tp=2": 2, "dp=4": 4}.get(shape, 1)
        # Weights and gradient; moments are slices.
        assert num_bytes <= 4 * (2 * local + 2 * (local // slices + 1))


def in_passes(mesh: Mesh, folder: str, together: int) -> Any:
    """Five adapters of which so many fit into a pass; one is poisoned, one overflows."""
    engine = opened(mesh, folder, 5)
    engine.poison("a1", "bad data")
    if mesh.world_rank == mesh.world.size - 1:
        engine.adapters["a3"].require_grad()[0] = torch.inf
    stepping.PASS_NUMBERS = together * engine.adapters["a0"].part.longest
    mesh.traffic.clear()
    outcomes = engine.optim_step(steps_of([f"a{n}" for n in range(5)]))
    calls = {name: sent.calls for name, sent in mesh.traffic.sent().items()}
    assert_replicas(mesh, engine)
    states = [engine.state(f"a{n}") for n in range(5)]
    return {
        "calls": calls,
        "outcomes": [str(outcome) for outcome in outcomes],
        "weights": [state.weights for state in states],
        "moments": [state.exp_avg for state in states if state.exp_avg is not None],
    }


@pytest.mark.parametrize("shape", ["dp=2", "tp=2", "dp=2,tp=2"])
def test_steps_in_several_passes_are_those_in_one(tiny, shape: str):
    folder = str(tiny("llama", **FOUR))
    whole = run_ranks(in_passes, shape, folder, 5)
    for together, times in ((2, 2), (1, 4), (0, 4)):
        for one, rank in zip(whole, run_ranks(in_passes, shape, folder, together), strict=True):
            assert rank["outcomes"] == one["outcomes"]
            for kind in ("weights", "moments"):
                for found, expected in zip(rank[kind], one[kind], strict=True):
                    assert np.array_equal(found, expected)
            expected_calls = {name: times * calls for name, calls in one["calls"].items()}
            if together < 2 and "dp" in shape:
                expected_calls["dp.gather"] -= 1  # nothing is published where all refuse
            assert rank["calls"] == expected_calls


def test_passes_are_as_full_as_may_be():
    spans = stepping.passes([3, 3, 4, 11, 1, 9, 10], 10)
    assert [(one.start, one.stop) for one in spans] == [(0, 3), (3, 4), (4, 6), (6, 7)]
    assert list(stepping.passes([])) == []


def refused(mesh: Mesh, folder: str, where: int) -> Any:
    """A number that is not finite, on one rank alone."""
    engine = opened(mesh, folder, 2)
    before = [engine.state(name) for name in ("a0", "a1")]
    if mesh.world_rank == where:
        engine.adapters["a0"].require_grad()[-1] = torch.inf
    outcomes = engine.optim_step(steps_of(["a0", "a1"]))
    assert isinstance(outcomes[0], NotFinite)
    must(outcomes[1:])
    after = [engine.state(name) for name in ("a0", "a1")]
    assert np.array_equal(before[0].weights, after[0].weights)
    assert not np.array_equal(before[1].weights, after[1].weights)
    assert (after[0].step, after[1].step, after[0].exp_avg) == (0, 1, None)
    assert not any(adapter.has_grad for adapter in engine.adapters.values())
    assert_replicas(mesh, engine)


@pytest.mark.parametrize(("shape", "where"), [("dp=2", 0), ("dp=2", 1), ("tp=2", 1), ("dp=4", 2)])
def test_all_ranks_refuse_what_one_of_them_cannot_use(tiny, shape: str, where: int):
    run_ranks(refused, shape, str(tiny("llama", **FOUR)), where)


def bad_loss(mesh: Mesh, folder: str) -> Any:
    """An adapter whose work runs on one rank and gives no number, beside a good one."""
    engine = opened(mesh, folder, 2)
    rng = np.random.default_rng(1)
    works = [work_of(name, "cross_entropy", random_data(rng, 1)) for name in ("a0", "a1")]
    works[0].data[0].loss_inputs["weights"][0] = 3e38
    outcomes = engine.forward_backward(works)
    assert isinstance(outcomes[0], NotFinite)
    must(outcomes[1:])
    assert_replicas(mesh, engine)
    assert engine.state("a0").grad is None
    outcomes = engine.optim_step(steps_of(["a0", "a1"]))
    assert isinstance(outcomes[0], StepRefused)
    must(outcomes[1:])
    assert_replicas(mesh, engine)


@pytest.mark.parametrize("shape", ["dp=4", "tp=2", "dp=2,tp=2"])
def test_all_ranks_know_of_a_loss_that_one_of_them_has(tiny, shape: str):
    run_ranks(bad_loss, shape, str(tiny("llama", **FOUR)))


def one_raises(mesh: Mesh, folder: str) -> None:
    engine = opened(mesh, folder, 2)
    if mesh.world_rank == 1:

        def run(*_: Any, **__: Any) -> Any:
            raise RuntimeError("out of memory on one rank")

        engine._run = run  # type: ignore[method-assign]
    rng = np.random.default_rng(1)
    works = [work_of(name, "cross_entropy", random_data(rng, 3)) for name in ("a0", "a1")]
    engine.forward_backward(works)


@pytest.mark.parametrize("shape", ["dp=2", "tp=2"])
def test_an_exception_on_one_rank_surfaces(tiny, shape: str):
    with pytest.raises(RankFailed, match="out of memory on one rank"):
        run_ranks(one_raises, shape, str(tiny("llama", **FOUR)))
