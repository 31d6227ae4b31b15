"""Sampling on a mesh: the answers of a single process, on every rank."""

import time
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from manylora import Trainer
from manylora.engine import Engine
from manylora.parallel import Mesh
from manylora.types import Sample, SampleResult, SamplingParams, Scoring
from tests.models import TinyBases
from tests.parallel.processes import run_ranks
from tests.parallel.test_base import MESHES, folder_of
from tests.parallel.test_forward import engine_with

NAMES = ["one", "three", "head"]


def requests(vocab: int, count: int = 9) -> list[Sample]:
    """Prompts of very different lengths, by adapters, a snapshot and the bare base."""
    rng = np.random.default_rng(5)
    found = []
    for number in range(count):
        prompts = [rng.integers(0, vocab, int(rng.integers(1, 40))) for _ in range(number % 3 + 1)]
        drawn = number % 2
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 14)),
            temperature=0.8 * drawn,
            top_p=0.9 if number == 5 else 1.0,
            seed=number,
        )
        adapter = [*NAMES, None][number % 4]
        scoring = Scoring(prompt=number % 3 == 0, topk_prompt=2 * drawn, topk_sampled=number % 2)
        found.append(
            Sample(
                adapter=None if number == 4 else adapter,
                snapshot="kept" if number == 4 else None,
                prompts=prompts,
                params=params,
                num_samples=1 + number % 2,
                scoring=scoring,
            )
        )
    return found


def plain(result: SampleResult) -> Any:
    return {
        "tokens": [list(one.tokens) for one in result.sequences],
        "reasons": [one.stop_reason for one in result.sequences],
        "logprobs": [np.array(one.logprobs) for one in result.sequences],
        "topk": [one.topk.logprobs for one in result.sequences if one.topk is not None],
        "scores": [scores.logprobs for scores in result.prompts],
        "best": [scores.topk.tokens for scores in result.prompts if scores.topk is not None],
    }


def engine_for(mesh: Mesh | None, folder: str) -> Engine:
    engine = engine_with(mesh, folder, NAMES)
    engine.snapshot("three", "kept")
    return engine


def sampled(mesh: Mesh | None, folder: str):
    """The answers in order, requests joining while others decode."""
    engine = engine_for(mesh, folder)
    samples = requests(engine.base.vocab_size)
    assert engine.admit(samples[:4]) == [None] * 4
    answers = dict[int, Any]()
    counts = []
    for joining in [samples[4:6], samples[6:], *[[]] * 200]:
        for sample, result in engine.decode(0.0):
            assert isinstance(result, SampleResult)
            answers[next(i for i, s in enumerate(samples) if s is sample)] = plain(result)
        counts.append(engine.decoding)
        if joining:
            engine.admit(joining)
        if not engine.decoding:
            break
    return {"answers": [answers[i] for i in range(len(samples))], "counts": counts}


@lru_cache
def alone(folder: str):
    return sampled(None, folder)["answers"]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("base", ["llama", "gemma2"])
def test_answers_are_those_of_one_process(tiny: TinyBases, base: str, mesh: str):
    folder = str(folder_of(tiny, base))
    expected = alone(folder)
    exact = "tp" not in mesh
    results = run_ranks(sampled, mesh, folder)
    for result in results:
        assert result["counts"] == results[0]["counts"]
        for found, wanted in zip(result["answers"], expected, strict=True):
            for word in ("tokens", "reasons"):
                assert found[word] == wanted[word], word
            for word in ("logprobs", "topk", "scores", "best"):
                for one, other in zip(found[word], wanted[word], strict=True):
                    if exact:
                        np.testing.assert_array_equal(one, other)
                    else:
                        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def single(mesh: Mesh | None, folder: str):
    engine = engine_for(mesh, folder)
    sample = Sample(adapter="three", prompts=[list(range(40))], params=SamplingParams(max_tokens=6))
    result = engine.sample([sample])[0]
    assert isinstance(result, SampleResult)
    return plain(result)


@pytest.mark.parametrize("mesh", ["dp=2", "dp=4"])
def test_ranks_without_a_request_keep_step(tiny: TinyBases, mesh: str):
    folder = str(folder_of(tiny, "llama"))
    expected = single(None, folder)
    for result in run_ranks(single, mesh, folder):
        assert result["tokens"] == expected["tokens"]
        assert result["logprobs"][0].tobytes() == expected["logprobs"][0].tobytes()


def cancelled(mesh: Mesh, folder: str):
    """One request is dropped half way; training goes on between two turns of the others."""
    engine = engine_for(mesh, folder)
    samples = [
        Sample(adapter=None, prompts=[[1, 2, 3]], params=SamplingParams(max_tokens=n, stop=()))
        for n in (4, 100, 6)
    ]
    engine.admit(samples)
    done = []
    for turn in range(30):
        done += [samples.index(sample) for sample, _ in engine.decode(0.0)]
        if turn == 3:
            engine.cancel(samples[1])
        if not engine.decoding:
            break
    again = engine.sample([samples[0]])[0]
    assert isinstance(again, SampleResult)
    return {"done": done, "again": plain(again)["tokens"]}


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_a_request_can_be_dropped(tiny: TinyBases, mesh: str):
    folder = str(folder_of(tiny, "llama"))
    results = run_ranks(cancelled, mesh, folder)
    assert all(result["done"] == [0, 2] for result in results)
    assert len({str(result["again"]) for result in results}) == 1


def interrupted(mesh: Mesh | None, folder: str):
    """Two requests of several prompts, one of which is ended half way."""
    engine = engine_for(mesh, folder)
    samples = [
        Sample(
            adapter=name,
            prompts=[[1, 2, 3], [4, 5], [6]],
            params=SamplingParams(max_tokens=60, stop=(), temperature=0.9, seed=2),
            num_samples=2,
            scoring=Scoring(topk_sampled=2),
        )
        for name in ("one", "three")
    ]
    engine.admit(samples)
    found = dict[int, Any]()
    for turn in range(90):
        for sample, result in engine.decode(0.0):
            assert isinstance(result, SampleResult)
            found[0 if sample is samples[0] else 1] = plain(result)
        if turn == 20 and mesh is not None:
            engine.interrupt(samples[0])
        if not engine.decoding:
            break
    return [found[0], found[1]]


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2"])
def test_an_interrupted_request_has_a_beginning_of_its_answer(tiny: TinyBases, mesh: str):
    folder = str(folder_of(tiny, "llama"))
    whole, other = interrupted(None, folder)
    for ended, kept in run_ranks(interrupted, mesh, folder):
        assert kept["tokens"] == other["tokens"]
        assert ended["reasons"] == ["interrupted"] * 6
        for found, expected in zip(ended["tokens"], whole["tokens"], strict=True):
            assert 0 < len(found) < 60 and found == expected[: len(found)]


def test_an_interrupt_reaches_the_processes_of_a_mesh(tiny: TinyBases):
    params = SamplingParams(max_tokens=110, stop=(), temperature=0.9)
    with Trainer(folder_of(tiny, "llama"), mesh="dp=2", threads=1) as trainer:
        adapter, other = (trainer.create(name, rank=2) for name in ("a", "b"))
        kept = other.sample([[1, 2]], params, num_samples=4)
        ended = [adapter.sample([[1, 2]], params, num_samples=40) for _ in range(4)]
        adapter.interrupt().result()
        whole = kept.result().sequences
        assert [one.stop_reason for one in whole] == ["length"] * 4
        for future in ended:
            sequences = future.result().sequences
            assert len(sequences) == 40
            assert sequences[0].tokens == whole[0].tokens[: len(sequences[0].tokens)]
        assert any(one.stop_reason == "interrupted" for one in ended[-1].result().sequences)
        assert adapter.sample([[1]], params).result().sequences[0].stop_reason == "length"


def timed(mesh: Mesh, folder: str):
    """Clocks that disagree: only the leader's ends a call."""
    engine = engine_for(mesh, folder)
    params = SamplingParams(max_tokens=60, stop=())
    engine.admit([Sample(adapter=None, prompts=[[1, 2]] * 3, params=params)])
    true = time.monotonic
    time.monotonic = lambda: true() + 1000.0 * mesh.world_rank
    calls = 0
    while engine.decoding:
        engine.decode(0.005)
        calls += 1
    return calls


def test_all_ranks_end_at_the_same_turn(tiny: TinyBases):
    calls = run_ranks(timed, "dp=2,tp=2", str(folder_of(tiny, "llama")))
    assert len(set(calls)) == 1 and calls[0] > 1
