"""The benchmark of runs at once trains what it says, in every arm, and counts all of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rl
from benchmarks.rl_arms import REWARDS, Arm, Counts, RlLoad, bench, counted
from benchmarks.rl_overheads import measure_publish, measure_report
from manylora.config import load_run_file
from manylora.runs.train import train_run_file


def test_what_a_run_has_left_is_counted(tmp_path: Path):
    load = RlLoad(sequences=16, steps=2, tokens=3)
    ((file,),) = Arm("at once", 1, 2).files(tmp_path, load, adapters=2, threads=1)
    assert train_run_file(load_run_file(file), view="plain") == 0
    counts = Counts()
    counted(file.with_suffix(""), counts)
    metrics = file.with_suffix("").glob("*/metrics.jsonl")
    rows = [json.loads(line) for path in metrics for line in path.read_text().splitlines()]
    # Two adapters, two steps, two groups of eight; an answer has three tokens or a stop in them.
    assert counts.groups == 8
    assert 64 <= counts.sampled <= 64 * 3
    assert counts.sampled == sum(row["sampled_tokens"] for row in rows)
    assert counts.trained == sum(row["trained_tokens"] for row in rows) > 0
    assert counts.read == sum(row["tokens"] for row in rows) > counts.trained


def test_arms_deal_out_all_adapters(tmp_path: Path):
    def dealt(arm: Arm) -> list[list[list[str]]]:
        files = arm.files(tmp_path, RlLoad(sequences=8), adapters=3, threads=1)
        runs = [[load_run_file(file) for file in own] for own in files]
        return [[[entry.name for entry in run.adapters] for run in own] for own in runs]

    first, second, third = names = ["digits0", "digits1", "digits2"]
    assert dealt(Arm("at once", 0, 3)) == [[names]]
    assert dealt(Arm("one at a time", 0, 1)) == [[[first], [second], [third]]]
    assert dealt(Arm("processes", 0, 1, processes=3)) == [[[first]], [[second]], [[third]]]


def test_a_wait_follows_from_what_was_sampled():
    found: dict[str, Any] = {}
    exec(REWARDS, found)
    ids = [[n, n + 1] for n in range(4000)]
    waits = [found["_seconds"](one, 0.5, 1.0) for one in ids]
    assert waits == [found["_seconds"](one, 0.5, 1.0) for one in ids]
    # Its mean is 0.5, its median less; the error of a mean of so many is 0.01.
    assert sum(waits) / len(waits) == pytest.approx(0.5, abs=0.05)
    assert sorted(waits)[2000] == pytest.approx(0.5 * math.exp(-0.5), abs=0.03)
    assert found["_seconds"](ids[0], 0.5, 0.0) == 0.5


def test_a_tiny_table_has_both_arms_with_the_same_tokens(tmp_path: Path):
    report = rl.main(
        [
            *("--rounds", "1", "--adapters", "2", "--steps", "1", "--tokens", "2"),
            *("--loads", "2", "--lags", "1", "--out", str(tmp_path / "found")),
        ]
    )
    (row,) = report["rows"]
    assert row["same_tokens"]
    assert set(row["wall"]) == {"at once, lag 1", "one at a time, lag 1"}
    for (found,) in row["rounds"].values():
        assert found["counts"]["groups"] == 2
        assert 4 <= found["counts"]["sampled"] <= 8
        assert found["in_steps"] > 0
        assert found["wall"] > 0 and found["cpu"] > 0
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["load"] == "2"
    assert "| 2, no latency | at once | 1 |" in (tmp_path / "found.md").read_text()


@pytest.mark.slow
def test_the_memory_of_all_processes_of_an_arm_is_counted(tmp_path: Path):
    arm = Arm("processes", 0, 1, processes=2)
    with bench(tmp_path, [arm], adapters=2, threads=1) as opened:
        both = opened.memory(arm)
    assert both["processes"] == 2
    # A base of torch takes this much in each; pages of libraries are shared.
    assert both["peak_rss"] > both["pss"] > 2 * 100e6


def test_publishes_and_pages_are_measured(tmp_path: Path):
    few, more = measure_publish(tmp_path, [1, 2], steps=2, threads=1)
    # A version at the beginning of each step, and the weights at the end are nobody's to sample.
    assert (few["publishes"], more["publishes"]) == (2, 4)
    assert 0 < few["copying_seconds"] < few["wall"]
    assert few["of_engine"] < few["of_training"] < 1
    report = measure_report(tmp_path, adapters=1, pages=3, threads=1, steps=1, tokens=2)
    assert 64 <= report["sampled"] <= 128
    assert report["page_bytes"] > report["bytes_a_step"] > 0
    assert 0 < report["recording_of_cpu"] < 1
