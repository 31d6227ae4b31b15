"""The figures of a step, worked out by hand; and a run's files bear a step that lacks some."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy import nan

from manylora.runs.events import StepDone
from manylora.runs.outcome import Outcome
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.runs.rl.step_figures import RL_COLUMNS, TrainedPass, rl_columns, step_figures
from manylora.runs.trackers import scalars
from manylora.types.data import Array
from tests.unit.runs.rl.toy_policy import settings


def one_turn(q: Sequence[float], versions: Sequence[int]) -> RolloutSegment:
    """A prompt of two tokens, then what was sampled."""
    own = np.arange(2 + len(q)) >= 2
    logprobs, drawn_by = np.zeros(len(own), np.float32), np.full(len(own), -1, np.int32)
    logprobs[2:], drawn_by[2:] = q, versions
    return RolloutSegment(np.arange(len(own), dtype=np.int32), own, logprobs, drawn_by)


def groups() -> list[SampleGroup]:
    first = (
        Rollout(
            segments=(one_turn([-1.0, -2.0], [4, 5]),),
            reward=1.0,
            parts={"exact": 1.0, "short": None},
            seconds=3.0,
        ),
        Rollout(
            segments=(one_turn([-1.5], [5]),),
            reward=0.0,
            parts={"exact": 0.0, "short": 0.5},
            stop_reason="length",
            turns=2,
            seconds=1.0,
        ),
    )
    second = tuple(replace(first[1], reward=0.5, seconds=2.0) for _ in range(2))
    shared = {"step": 6, "row": 0, "version": 4}
    return [
        SampleGroup(number=number, rollouts=rollouts, **shared)
        for number, rollouts in enumerate((first, second))
    ]


def numbers(*samples: Sequence[float]) -> list[Array]:
    return [np.array(one, np.float32) for one in samples]


P = numbers([-1.25, -2.0], [-1.0])


def figures_of(given: dict[str, Any], logprobs: list[Array], **more: Any) -> dict[str, Any]:
    objective = Objective(settings(advantage={"kind": "dr_grpo"}, **given))
    batch = objective.batch(groups())
    proximal = P if objective.needs_proximal else None
    (minibatch,) = batch.minibatches(proximal, more.get("reference"))
    positions = [np.array([1, 2]), np.array([1])]
    entropies = numbers([1.0, 2.0], [3.0])
    passes = [TrainedPass(minibatch, logprobs, positions, entropies)]
    return step_figures(objective, batch, 5, proximal=proximal, passes=passes, **more)


def test_rewards_and_samples():
    found = figures_of({}, P)
    expected = {
        "reward": 0.5,
        "reward_std": float(np.std([1, 0, 0.5, 0.5], ddof=1)),
        "reward_min": 0.0,
        "reward_max": 1.0,
        "reward/exact": 0.25,
        "reward/short": 0.5,
        "advantage_std": float(np.std([0.5, -0.5, 0, 0], ddof=1)),
        "groups": 2,
        "zero_variance_groups": 1,
        "sampled_tokens": 5,
        "trained_tokens": 3,
        "tokens": 5,
        "length": 1.25,
        "length_max": 2,
        "truncated_share": 0.75,
        "turns": 1.75,
        "rollout_seconds_median": 2.0,
        "rollout_seconds_max": 3.0,
        "staleness": 0.2,
        "staleness_max": 1,
        "version": 5,
        "entropy": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert list(found) == [column.name for column in rl_columns(["exact", "short"]).step]


@pytest.mark.parametrize("updates", [1, 2])
def test_how_far_sampler_and_trainer_are_apart(updates: int):
    """With a pass before the step, and with one pass for both: p is the same."""
    found = figures_of({"loss": {"updates": updates}}, P)
    log_w = np.array([-0.25, 0.0, 0.5])
    expected = {
        "logprob_gap": 0.25,
        "logprob_gap_max": 0.5,
        "logprob_gap_current": 0.25,
        "logprob_gap_current_max": 0.5,
        "behavior_k1": -0.25 / 3,
        "behavior_k3": float(np.mean(np.exp(log_w) - log_w - 1)),
        "w": float(np.exp(log_w).mean()),
        "w_max": float(np.exp(0.5)),
        "rejected_share": 0.0,
        "ratio": 1.0,
        "ratio_max": 1.0,
        "clip_share_low": 0.0,
        "clip_share_high": 0.0,
        "kl": None,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["tokens"] == (5 if updates == 1 else 10)


def test_the_tokens_of_the_current_version_are_told_apart():
    """All but the first token were drawn by version 5."""
    found = figures_of({"loss": {"updates": 2}}, P)
    assert found["logprob_gap_current"] == pytest.approx(0.25)
    objective = Objective(settings())
    batch = objective.batch(groups())
    older = step_figures(objective, batch, 6, proximal=P)
    assert older["logprob_gap_current"] is None
    assert older["staleness_max"] == 2


def test_bounds_that_held_a_token_are_counted():
    """Ratios 2 and 1 where A > 0, and ½ where A < 0; then all the other way round."""
    step = numbers([np.log(2), 0.0], [np.log(0.5)])
    up = [p + d for p, d in zip(P, step, strict=True)]
    down = [p - d for p, d in zip(P, step, strict=True)]
    shares = ("clip_share_low", "clip_share_high")
    found = figures_of({"loss": {"updates": 2}}, up)
    assert [found["ratio"], found["ratio_max"]] == pytest.approx([3.5 / 3, 2.0])
    assert [found[name] for name in shares] == pytest.approx([1 / 3, 1 / 3])
    assert [figures_of({"loss": {"updates": 2}}, down)[name] for name in shares] == [0.0, 0.0]
    cispo = {"kind": "cispo", "clip_low": 0.2, "clip_high": 0.2, "updates": 2}
    assert [figures_of({"loss": cispo}, down)[name] for name in shares] == pytest.approx(
        [1 / 3, 1 / 3]
    )
    gspo = figures_of({"loss": {"kind": "gspo", "clip_low": 0.2, "clip_high": 0.2}}, up)
    assert [gspo["ratio_max"], *(gspo[name] for name in shares)] == pytest.approx(
        [2**0.5, 1 / 3, 2 / 3]
    )
    unbound = figures_of({"loss": {"kind": "importance_sampling", "updates": 2}}, up)
    assert [unbound[name] for name in shares] == [None, None]


def test_rejected_tokens_and_the_reference():
    masked = {"off_policy": {"correct": "token_mask", "max": 1.2}}
    objective = Objective(settings(**masked))
    batch = objective.batch(groups())
    proximal = [*P, *numbers([-1.5], [-1.5])]
    found = step_figures(objective, batch, 5, proximal=proximal)
    assert found["rejected_share"] == pytest.approx(1 / 5)
    pulled = Objective(settings(kl={"coef": 0.1}, loss={"updates": 2}))
    reference = [p + np.float32(0.5) for p in proximal]
    found = step_figures(pulled, pulled.batch(groups()), 5, proximal=proximal, reference=reference)
    assert found["kl"] == pytest.approx(float(np.exp(0.5)) - 1.5)


def test_what_a_skipped_step_does_not_have_is_none():
    objective = Objective(settings())
    found = step_figures(objective, objective.batch(groups()[1:]), 5, parts=["exact", "other"])
    assert found["reward"] == 0.5
    assert (found["reward/exact"], found["reward/other"]) == (0.0, None)
    assert (found["tokens"], found["trained_tokens"]) == (0, 0)
    missing = ("loss", "ratio", "entropy", "w", "logprob_gap", "rejected_share", "clip_share_low")
    assert [found[name] for name in missing] == [None] * len(missing)
    empty = step_figures(objective, objective.batch([]), 5)
    assert (empty["reward"], empty["groups"], empty["length_max"]) == (None, 0, None)


def test_a_run_bears_steps_that_lack_figures():
    objective = Objective(settings())
    skipped = step_figures(objective, objective.batch(groups()[1:]), 5)
    trained = figures_of({}, P) | {"loss": 0.25, "grad_norm": 1.0, "lr": 0.1, "reward": 0.75}
    outcome = Outcome(RL_COLUMNS)
    for figures in ({**skipped, "reward": None}, trained, skipped, {**skipped, "reward": None}):
        assert RL_COLUMNS.not_finite(figures) == ""
        outcome.count(figures, 0.5)
    assert (outcome.ends["first_reward"], outcome.ends["last_reward"]) == (0.75, 0.5)
    assert outcome.sums["tokens"] == 5
    assert outcome.sums["dropped_groups"] == 0
    assert "loss nan" in RL_COLUMNS.not_finite({**trained, "loss": nan})
    shown = scalars(StepDone("a", 1, 2, skipped, 0.5), RL_COLUMNS)
    assert "train/loss" not in shown
    assert shown["train/reward"] == 0.5
    assert RL_COLUMNS.curve.name == "reward"
