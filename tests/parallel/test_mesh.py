"""The mesh's collectives on real processes, and the harness that runs them."""

import time

import numpy as np
import pytest
import torch

from manylora.parallel import Mesh
from tests.parallel.processes import RankFailed, run_ranks

SHAPES = ["dp=2", "tp=2", "dp=4", "dp=2,tp=2", "dp=3", "tp=4"]


def places(mesh: Mesh):
    axes = {"dp": mesh.dp, "tp": mesh.tp, "world": mesh.world}
    found = {}
    for name, axis in axes.items():
        number = torch.tensor([float(mesh.world_rank)])
        found[name] = {
            "index": axis.index,
            "gathered": axis.gather(number).view(-1).tolist(),
            "sum": axis.sum_(number.clone()).item(),
            "max": axis.max_(number.clone()).item(),
            "exchanged": axis.exchange(10 * number + torch.arange(axis.size).view(-1, 1))
            .view(-1)
            .tolist(),
        }
    return {"rank": mesh.world_rank, "axes": found}


@pytest.mark.parametrize("shape", ["dp=1", *SHAPES])
def test_every_collective_runs_along_its_own_axis(shape: str):
    results = run_ranks(places, shape)
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in shape.split(","))}
    dp, tp = sizes.get("dp", 1), sizes.get("tp", 1)
    assert len(results) == dp * tp
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        d, t = divmod(rank, tp)
        along = {
            "dp": (d, [i * tp + t for i in range(dp)]),
            "tp": (t, [d * tp + j for j in range(tp)]),
            "world": (rank, list(range(dp * tp))),
        }
        for name, (index, ranks) in along.items():
            assert result["axes"][name] == {
                "index": index,
                "gathered": ranks,
                "sum": sum(ranks),
                "max": max(ranks),
                "exchanged": [10 * r + index for r in ranks],
            }


def sums(mesh: Mesh):
    """The sums of some numbers: alone, and elsewhere in tensors of other sizes."""
    generator = torch.Generator().manual_seed(mesh.world_rank)
    numbers = torch.randn(1000, generator=generator)
    found = {"mine": numbers.numpy(), "alone": mesh.world.sum_(numbers.clone()).numpy()}
    for before, after in ((1, 0), (7, 60_001), (300_000, 3)):
        whole = torch.cat([torch.ones(before), numbers, torch.ones(after)])
        mesh.world.sum_(whole)
        found[f"{before}"] = whole[before : before + 1000].numpy()
    strided = torch.ones(1000, 3)
    strided[:, 1] = numbers
    mesh.world.sum_(strided[:, 1])
    found["strided"], found["beside"] = strided[:, 1].numpy(), strided[:, ::2].numpy()
    found["half"] = mesh.world.sum_(numbers.bfloat16()).float().numpy()
    return found


@pytest.mark.parametrize("shape", ["dp=2", "dp=3", "tp=4"])
def test_a_sum_has_the_same_bits_wherever_it_lies(shape: str):
    results = run_ranks(sums, shape)
    expected, half = results[0]["mine"].copy(), torch.from_numpy(results[0]["mine"]).bfloat16()
    half = half.float()
    for result in results[1:]:
        expected += result["mine"]
        half += torch.from_numpy(result["mine"]).bfloat16().float()
    for result in results:
        for name in ("alone", "1", "7", "300000", "strided"):
            assert result[name].tobytes() == expected.tobytes(), name
        assert (result["beside"] == 1.0).all()
        assert result["half"].tobytes() == half.bfloat16().float().numpy().tobytes()


def counted(mesh: Mesh):
    mesh.tp.sum_(torch.zeros(8))
    mesh.tp.sum_(torch.zeros(0))
    mesh.dp.gather(torch.zeros(4))
    mesh.dp.gather(torch.zeros(2))
    mesh.world.exchange(torch.zeros(mesh.world.size, 3))
    sent = {name: [one.calls, one.bytes] for name, one in mesh.traffic.sent().items()}
    total = [mesh.traffic.calls, mesh.traffic.bytes]
    mesh.traffic.clear()
    return {"sent": sent, "total": total, "after": mesh.traffic.calls}


def test_what_is_sent_is_counted_and_an_axis_of_one_sends_nothing():
    for result in run_ranks(counted, "dp=2,tp=2"):
        assert result["sent"] == {
            "tp.sum": [1, 32],
            "dp.gather": [2, 24],
            "world.exchange": [1, 36],
        }
        assert result["total"] == [4, 92] and result["after"] == 0
    (alone,) = run_ranks(counted, "dp=1")
    assert alone == {"sent": {}, "total": [0, 0], "after": 0}


def fails(mesh: Mesh, rank: int):
    if mesh.world_rank == rank:
        raise ValueError("rank gone astray")
    mesh.world.sum_(torch.zeros(1))


def hangs(mesh: Mesh, rank: int):
    if mesh.world_rank != rank:
        mesh.world.sum_(torch.zeros(1))
    else:
        time.sleep(1000)


def returns_arrays(mesh: Mesh, scale: float):
    return [{"a": np.arange(3, dtype=np.float32) * scale}, mesh.world_rank, None, "text"]


def test_a_rank_that_fails_fails_the_call_with_its_traceback():
    with pytest.raises(RankFailed, match="ValueError: rank gone astray"):
        run_ranks(fails, "dp=2", 1)


def test_ranks_that_hang_are_shown_where_they_stand():
    with pytest.raises(RankFailed) as raised:
        run_ranks(hangs, "dp=2", 1, limit=1.0)
    words = str(raised.value)
    assert "in hangs" in words and "in sum_" in words
    assert words.count("--- rank") == 2


def test_results_come_back_with_their_arrays():
    for rank, (first, *rest) in enumerate(run_ranks(returns_arrays, "tp=2", 2.0)):
        assert first["a"].dtype == np.float32 and first["a"].tolist() == [0.0, 2.0, 4.0]
        assert rest == [rank, None, "text"]
