"""Adapters that learn from rewards get together exactly what each gets alone.

Hypothesis draws up to four adapters: their losses, lags, waves, pulls, when they join and leave,
how long their answers take; the reward of one may fail at some step.
"""

import asyncio
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

from manylora import Trainer
from manylora.config import RlSettings
from manylora.runs.rl.embedded import EmbeddedSampler
from manylora.types import AdapterSpec, RolloutFailed
from tests.unit.runs.rl.toy_runs import Ended, Toy, low, run_toy, settings

pytestmark = pytest.mark.usefixtures("threads")
LOSSES: list[dict[str, Any]] = [
    {"kind": "ppo"},
    {"kind": "ppo", "updates": 2, "minibatches": 2},
    {"kind": "cispo", "aggregate": "constant"},
    {"kind": "importance_sampling", "aggregate": "sequences"},
    {"kind": "gspo", "clip_low": 0.01, "clip_high": 0.01},
    {"kind": "dro", "beta": 0.1},
]
PULLS: list[dict[str, Any]] = [
    {},
    {"coef": 0.1, "where": "reward"},
    {"coef": 0.1, "where": "reward", "reference": "start"},
]
OFF_POLICY = st.fixed_dictionaries(
    {
        "lag": st.integers(0, 2),
        "correct": st.sampled_from(["token_truncate", "token_mask", "sequence_mask", "none"]),
        "proximal": st.sampled_from(["recompute", "behavior"]),
    }
)


@dataclass(frozen=True)
class Guest:
    """One adapter of a schedule; it joins when the first has had so many groups made."""

    rl: RlSettings
    spec: AdapterSpec
    seed: int
    joins: int
    slow: bool


RL = st.builds(
    settings,
    loss=st.sampled_from(LOSSES),
    kl=st.sampled_from(PULLS),
    off_policy=OFF_POLICY,
    advantage=st.fixed_dictionaries({"kind": st.sampled_from(["grpo", "rloo", "dr_grpo"])}),
    dynamic_sampling=st.fixed_dictionaries({"on": st.booleans(), "most_waves": st.just(2)}),
    group_size=st.integers(2, 3),
    max_steps=st.integers(1, 4),
    sampling=st.fixed_dictionaries(
        {
            "max_tokens": st.integers(2, 6),
            "temperature": st.sampled_from([0.8, 1.0]),
            "stop": st.just([3]),
        }
    ),
)
GUESTS = st.builds(
    Guest,
    rl=RL,
    spec=st.builds(AdapterSpec, rank=st.sampled_from([1, 3, 8]), seed=st.integers(0, 2)),
    seed=st.integers(0, 1),
    joins=st.integers(0, 4),
    slow=st.booleans(),
)


@pytest.fixture(scope="module")
def trainer(tiny: Callable[[str], Path]) -> Iterator[Trainer]:
    with Trainer(tiny("llama"), token_budget=128) as opened:
        yield opened


def failing(row: int, tokens: Sequence[int], *, left: list[int]) -> float:
    """The judge is out once it was asked so often."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("the judge is out")
    return low(row, tokens)


def toy_of(guest: Guest, fails: int | None, waits: random.Random) -> Toy:
    toy = Toy(guest.rl, seed=guest.seed)
    if guest.slow:
        toy.delay = lambda step, number, sample: waits.choice([0.0, 0.002, 0.01])
    if fails is not None:
        toy.reward = partial(failing, left=[fails])
    return toy


def together(
    trainer: Trainer, folder: Path, guests: Sequence[Guest], fails: int | None
) -> list[Ended | BaseException]:
    toys = [
        toy_of(guest, fails if number == 1 else None, random.Random(number))
        for number, guest in enumerate(guests)
    ]
    # All of them ask one sampler, as those of a run might.
    sampler, over = EmbeddedSampler(), asyncio.Event()

    async def visit(number: int) -> Ended:
        while number and toys[0].ended < guests[number].joins and not over.is_set():
            await asyncio.sleep(0.001)
        try:
            return await run_toy(
                trainer,
                folder / f"guest-{number}",
                toys[number],
                name=f"guest-{number}",
                spec=guests[number].spec,
                sampler=sampler,
            )
        finally:
            if number == 0:
                over.set()

    async def all_of_them() -> list[Ended | BaseException]:
        return await asyncio.gather(*map(visit, range(len(guests))), return_exceptions=True)

    return asyncio.run(all_of_them())


def check(trainer: Trainer, guests: Sequence[Guest], fails: int | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = together(trainer, Path(scratch) / "together", guests, fails)
        for number, (guest, one) in enumerate(zip(guests, found, strict=True)):
            if isinstance(one, BaseException):
                assert isinstance(one, RolloutFailed), one
                assert number == 1 and fails is not None
                assert "the judge is out" in str(one)
                continue
            alone = asyncio.run(
                run_toy(
                    trainer,
                    Path(scratch) / f"alone-{number}",
                    toy_of(guest, fails if number == 1 else None, random.Random(9)),
                    name=f"guest-{number}",
                    spec=guest.spec,
                )
            )
            alone.same(one)


SCHEDULES = {
    "guests": st.lists(GUESTS, min_size=2, max_size=4),
    "fails": st.none() | st.integers(0, 20),
}
ALWAYS = with_settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@with_settings(ALWAYS, max_examples=6)
@given(**SCHEDULES)
def test_each_gets_what_it_gets_alone(trainer: Trainer, guests: Sequence[Guest], fails: int | None):
    check(trainer, guests, fails)


@pytest.mark.slow
@with_settings(ALWAYS, max_examples=60, derandomize=False)
@given(**SCHEDULES)
def test_each_gets_what_it_gets_alone_on_many_schedules(
    trainer: Trainer, guests: Sequence[Guest], fails: int | None
):
    check(trainer, guests, fails)
