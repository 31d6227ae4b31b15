"""Advantages, penalties, factors and corrections, each worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest

from manylora.config.rl import AdvantageSettings, OffPolicySettings, OverlongSettings
from manylora.runs.rl.advantages import advantages, overlong_penalties, token_factors
from manylora.runs.rl.corrections import corrected

SPLIT = np.array([1.0, 0.0, 0.0, 1.0])  # mean 0.5, deviation of n - 1: sqrt(1/3)


def of(groups: list[Any], **given: Any) -> list[list[float]]:
    found = advantages([np.array(one) for one in groups], AdvantageSettings(**given))
    return [one.tolist() for one in found]


def test_grpo_divides_by_the_groups_deviation():
    expected = 0.5 / (3**-0.5 + 1e-6)
    assert of([SPLIT])[0] == pytest.approx([expected, -expected, -expected, expected], rel=1e-12)


def test_dr_grpo_and_rloo_divide_by_nothing():
    assert of([SPLIT], kind="dr_grpo") == [[0.5, -0.5, -0.5, 0.5]]
    assert of([[1.0, 0.0, 0.5]], kind="rloo") == [[0.75, -0.75, 0.0]]


def test_the_batchs_deviation_is_of_all_groups():
    ragged = [[1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 3.0]]
    scale = np.std([1, 0, 2, 2, 2, 0, 0, 3], ddof=1) + 1e-6
    found = of(ragged, kind="dr_grpo", scale="batch")
    assert found[0] == pytest.approx([0.5 / scale, -0.5 / scale])
    assert found[1] == [0.0, 0.0, 0.0]
    assert found[2] == pytest.approx([-1 / scale, -1 / scale, 2 / scale])


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dr_grpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.1 + 0.2, 1 / 3, 1e9 + 0.1, -7.7])
def test_equal_rewards_have_no_advantage_at_all(kind: str, scale: str, reward: float):
    """Their mean may differ from each of them by rounding; 1e-6 would make that large."""
    for size in range(2, 12):
        found = of([[reward] * size, [0.0, 1.0]], kind=kind, scale=scale)
        assert found[0] == [0.0] * size
        assert found[1][0] < 0 < found[1][1]


def test_rewards_that_differ_by_rounding_stay_small():
    """0.1 + 0.2 is not 0.3, but the difference is far below 1e-6."""
    assert np.abs(of([[0.1 + 0.2, 0.3, 0.3]])).max() < 1e-9


@pytest.mark.parametrize(
    ("length", "truncated", "expected"),
    [(6, False, 0.0), (7, False, -0.5), (8, False, -1.0), (10, False, -2.0), (10, True, -2.0),
     (3, True, -2.0), (25, False, -2.0)],
)  # fmt: skip
def test_the_penalty_rises_over_the_buffer(length: int, truncated: bool, expected: float):
    overlong = OverlongSettings(buffer=4, penalty=2.0)
    found = overlong_penalties(np.array([length]), np.array([truncated]), 10, overlong)
    assert found.tolist() == [expected]


def test_without_a_buffer_only_what_was_cut_is_punished():
    overlong = OverlongSettings(penalty=2.0)
    found = overlong_penalties(np.array([10, 10, 3]), np.array([False, True, True]), 10, overlong)
    assert found.tolist() == [0.0, -2.0, -2.0]


# Samples 0, 2 and 5 of three, two and one token; one of 0 and the only one of 5 are rejected.
SAMPLES = np.array([0, 0, 0, 2, 2, 5])
KEPT = np.array([True, False, True, True, True, False])


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("tokens", [1 / 4, 0, 1 / 4, 1 / 4, 1 / 4, 0]),
        ("sequences", [1 / 4, 0, 1 / 4, 1 / 4, 1 / 4, 0]),
        ("constant", [1 / 20, 0, 1 / 20, 1 / 20, 1 / 20, 0]),
    ],
)
def test_rejected_tokens_leave_the_denominator(aggregate: Any, expected: list[float]):
    assert token_factors(SAMPLES, KEPT, aggregate, 10).tolist() == expected


def test_sequences_count_alike_whatever_their_length():
    everything = np.ones(6, dtype=bool)
    found = token_factors(SAMPLES, everything, "sequences", 10).tolist()
    assert found == pytest.approx([1 / 9] * 3 + [1 / 6] * 2 + [1 / 3])
    nothing = ~everything
    for aggregate in ("tokens", "sequences", "constant"):
        assert token_factors(SAMPLES, nothing, aggregate, 10).tolist() == [0.0] * 6


def weighed(log_w: list[float], samples: list[int], **given: Any) -> tuple[list[float], list[bool]]:
    p_T = np.array(log_w)
    weights_T, rejected_T = corrected(
        p_T, np.zeros(len(log_w)), np.array(samples), OffPolicySettings(**given)
    )
    return weights_T.tolist(), rejected_T.tolist()


def test_corrections_by_hand():
    """w = 4, ½, 1 in one sample (2 in all), and 3 in another."""
    log_w, samples = np.log([4.0, 0.5, 1.0, 3.0]).tolist(), [0, 0, 0, 1]
    expected: dict[str, tuple[list[float], list[bool]]] = {
        "token_truncate": ([2.5, 0.5, 1.0, 2.5], [False] * 4),
        "token_mask": ([0.0, 0.0, 1.0, 0.0], [True, True, False, True]),
        "sequence_truncate": ([2.0, 2.0, 2.0, 2.5], [False] * 4),
        "sequence_mask": ([2.0, 2.0, 2.0, 0.0], [False, False, False, True]),
        "none": ([1.0] * 4, [False] * 4),
    }
    for correct, (weights, rejected) in expected.items():
        found = weighed(log_w, samples, correct=correct, max=2.5, min=0.75)
        assert found[0] == pytest.approx(weights)
        assert found[1] == rejected
    assert weighed(log_w, samples, correct="token_mask", max=2.5)[1] == [True, False, False, True]


def test_sums_of_long_samples_are_exact_enough():
    """In single precision, a hundred thousand small terms beside a large one would be far off."""
    log_w = np.array([-16.0, *[1.6e-4] * 100_000])
    weights, _ = weighed(log_w.tolist(), [0] * len(log_w), correct="sequence_truncate", max=9.0)
    assert weights[0] == pytest.approx(math.exp(math.fsum(log_w)), rel=1e-7)


def test_a_sample_out_of_all_proportion_is_held_or_rejected():
    log_w, samples = [800.0, 800.0], [0, 0]
    assert weighed(log_w, samples, correct="sequence_truncate", max=2.0)[0] == [2.0, 2.0]
    assert weighed(log_w, samples, correct="sequence_mask", max=2.0) == ([0.0] * 2, [True] * 2)
    assert weighed(log_w, samples, correct="token_mask", max=2.0) == ([0.0] * 2, [True] * 2)
