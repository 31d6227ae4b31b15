"""Laws 1 and 2 under schedules that nobody thought of.

Hypothesis draws operations on a few adapters; each adapter has a reference engine of its own, which
sees only that adapter's operations, and a solo engine beside the crowd would show the same bits: a
twin engine is given the same operations one adapter at a time.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from manylora.checkpoint import load_state, save_state
from manylora.engine import Engine
from manylora.engine.reference import ReferenceEngine
from manylora.types import (
    AdamParams,
    AdapterSpec,
    Opening,
    OptimStep,
    Sample,
    SamplingParams,
)
from tests.laws.tenants import LOSSES, assert_same_state, must, perturb, random_data, work_of
from tests.models import TinyBases

NAMES = ("a", "b", "c", "d")
SPECS = st.builds(
    AdapterSpec,
    rank=st.sampled_from([1, 2, 5]),
    alpha=st.sampled_from([1.0, 4.0]),
    targets=st.sampled_from(
        ["all-linear", ("q_proj", "lm_head"), ("o_proj", "down_proj"), r".*layers\.1\..*"]
    ),
    use_rslora=st.booleans(),
    seed=st.integers(0, 3),
)
STEPS = st.builds(
    AdamParams,
    lr=st.sampled_from([0.0, 1e-3, 3e-3]),
    beta1=st.sampled_from([0.9, 0.5]),
    beta2=st.sampled_from([0.999, 0.9]),
    eps=st.just(1e-6),
    weight_decay=st.sampled_from([0.0, 0.1]),
    clip_norm=st.sampled_from([0.0, 0.5]),
)
WORKS = st.tuples(st.sampled_from(sorted(LOSSES)), st.integers(0, 3), st.integers(0, 10**6))
CROWDS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6)


@dataclass
class Books:
    """What is expected of one living adapter."""

    oracle: ReferenceEngine
    steps: int = 0
    snapshots: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


class Schedules(RuleBasedStateMachine):
    """Operations on the crowd, the twin, and the reference engines."""

    base: Path
    folder: Path

    @initialize(budget=st.sampled_from([16, 64, 4096]))
    def open(self, budget: int) -> None:
        self.crowd = Engine(Opening(str(self.base), token_budget=budget))
        self.twin = Engine(Opening(str(self.base), token_budget=budget))
        self.books: dict[str, Books] = {}
        self.saves = 0

    @rule(name=st.sampled_from(NAMES), spec=SPECS)
    def create(self, name: str, spec: AdapterSpec) -> None:
        """A new adapter, or a new one under the name of one that goes."""
        for engine in (self.crowd, self.twin):
            if name in self.books:
                engine.unload(name)
            engine.create(name, spec)
            perturb(engine, name)
        self.books[name] = Books(ReferenceEngine(self.base, self.crowd.state(name)))

    @precondition(lambda self: self.books)
    @rule(crowd=CROWDS, draws=st.lists(WORKS, min_size=6, max_size=6), backward=st.booleans())
    def work(self, crowd: list[str], draws: list[tuple[str, int, int]], backward: bool) -> None:
        works = []
        for name, (loss, count, seed) in zip(crowd, draws, strict=False):
            if name in self.books:
                data = random_data(np.random.default_rng(seed), count, loss, (1, 14))
                work = work_of(name, loss, data)
                works.append(replace(work, backward=backward or seed % 4 > 0))
        together = must(self.crowd.forward_backward(works))
        for work, result in zip(works, together, strict=True):
            alone = must(self.twin.forward_backward([work]))[0]
            assert all(map(np.array_equal, result.logprobs, alone.logprobs))
            oracle = self.books[str(work.adapter)].oracle
            with torch.set_grad_enabled(work.backward):
                if work.backward:
                    expected, _ = oracle.forward_backward(work.data, work.loss, work.config)
                else:
                    expected = [oracle.logprobs(datum) for datum in work.data]
            for found_N, expected_N in zip(result.logprobs, expected, strict=True):
                np.testing.assert_allclose(found_N, expected_N.numpy(), atol=1e-4)

    @precondition(lambda self: self.books)
    @rule(crowd=st.sets(st.sampled_from(NAMES), min_size=1), params=STEPS)
    def step(self, crowd: set[str], params: AdamParams) -> None:
        due = [OptimStep(adapter=name, params=params) for name in sorted(crowd & set(self.books))]
        for step, result in zip(due, must(self.crowd.optim_step(due)), strict=True):
            books = self.books[step.adapter]
            books.steps += 1
            norm = books.oracle.optim_step(params)
            np.testing.assert_allclose(result.grad_norm, norm, rtol=1e-3, atol=1e-5)
            assert must(self.twin.optim_step([step]))[0] == result
            assert result.step == books.steps

    @precondition(lambda self: self.books)
    @rule(crowd=CROWDS, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0]))
    def sample(self, crowd: list[str], seed: int, temperature: float) -> None:
        params = SamplingParams(max_tokens=3, temperature=temperature, seed=seed, stop=())
        requests = [
            Sample(
                adapter=name if name in self.books else None,
                prompts=[[3 + seed, 4], [5]],
                params=params,
            )
            for name in crowd
        ]
        for request, found in zip(requests, must(self.crowd.sample(requests)), strict=True):
            (alone,) = must(self.twin.sample([request]))
            assert found == alone  # tokens and log-probabilities, to the bit

    @precondition(lambda self: self.books)
    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        """An older snapshot still answers as it did; then a new one takes its place."""
        name = data.draw(st.sampled_from(sorted(self.books)))
        key, params = f"{name}@", SamplingParams(max_tokens=3, stop=())
        frozen = Sample(adapter=name, prompts=[[7, 8], [9]], params=params, snapshot=key)
        books = self.books[name]
        if key in books.snapshots:
            assert (
                tuple(s.tokens for s in must(self.crowd.sample([frozen]))[0].sequences)
                == books.snapshots[key]
            )
        self.crowd.snapshot(name, key)
        answers = must(self.crowd.sample([replace(frozen, snapshot=None)]))[0].sequences
        books.snapshots[key] = tuple(s.tokens for s in answers)

    @precondition(lambda self: self.books)
    @rule(data=st.data(), on_disk=st.booleans())
    def save_and_restore(self, data: st.DataObject, on_disk: bool) -> None:
        """The adapter goes and comes back in the crowd; its twin never left."""
        name = data.draw(st.sampled_from(sorted(self.books)))
        state = self.crowd.state(name)
        if on_disk:
            self.saves += 1
            folder = Path(tempfile.mkdtemp(dir=self.folder)) / "state"
            fingerprint = self.crowd.base.fingerprint
            save_state(folder, state, base_name="tiny", base_fingerprint=fingerprint, client={})
            state = load_state(
                folder, layout=None, spec=state.spec, base_fingerprint=fingerprint
            ).state
        self.crowd.unload(name)
        self.crowd.restore(name, state)

    @precondition(lambda self: self.books)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.books)))
        self.crowd.unload(name)
        self.twin.unload(name)
        del self.books[name]

    @invariant()
    def every_adapter_is_its_own(self) -> None:
        for name, books in getattr(self, "books", {}).items():
            state = self.crowd.state(name)
            assert_same_state(state, self.twin.state(name), name)
            np.testing.assert_allclose(state.weights, books.oracle.weights(), rtol=0, atol=5e-4)
            if state.grad is not None:
                expected_P = books.oracle.gradient()
                error = (torch.from_numpy(state.grad).sum(0) - expected_P).norm()
                assert error <= 1e-3 * expected_P.norm() + 1e-5, name


def run_schedules(tiny: TinyBases, folder: Path, examples: int, steps: int) -> None:
    base = tiny("qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    machine = type("Machine", (Schedules,), {"base": base, "folder": folder})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_schedules(tiny, tmp_path: Path, threads: int):
    run_schedules(tiny, tmp_path, examples=25, steps=25)


@pytest.mark.slow
def test_many_random_schedules(tiny, tmp_path: Path, threads: int):
    run_schedules(tiny, tmp_path, examples=150, steps=50)
