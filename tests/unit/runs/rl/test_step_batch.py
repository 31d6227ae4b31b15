"""What of a step's samples is trained, and what an optimizer step is given of it."""

from typing import Any

import numpy as np
import pytest

from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.types import DataError
from tests.unit.runs.rl.toy_policy import settings


def segment(*sampled: int) -> RolloutSegment:
    own = np.array(sampled, dtype=bool)
    logprobs = np.where(own, -1.0, 0.0).astype(np.float32)
    return RolloutSegment(
        np.arange(len(own), dtype=np.int32), own, logprobs, np.where(own, 0, -1).astype(np.int32)
    )


def group(number: int, *rollouts: Rollout) -> SampleGroup:
    return SampleGroup(step=1, number=number, row=number, version=0, rollouts=rollouts)


def rollout(reward: float, *segments: RolloutSegment, stop: str = "stop") -> Rollout:
    return Rollout(segments=segments or (segment(0, 1, 1),), reward=reward, stop_reason=stop)


DIFFERENT = group(0, rollout(1.0), rollout(0.0, segment(0, 0, 1, 0, 1), segment(0, 1)))
EQUAL = group(1, rollout(0.3), rollout(0.3))


def places(given: dict[str, Any], *groups: SampleGroup) -> list[int]:
    return [one.group for one in Objective(settings(**given)).batch(groups).sequences]


def test_groups_that_teach_nothing_are_left_out():
    assert places({}, DIFFERENT, EQUAL) == [0, 0, 0]
    assert places({"loss": {"updates": 2}}, EQUAL, DIFFERENT) == [1, 1, 1]
    objective = Objective(settings())
    assert objective.teaches(DIFFERENT)
    assert not objective.teaches(EQUAL)
    nothing = objective.batch([EQUAL])
    assert (nothing.forward_data(), [one.data for one in nothing.minibatches()]) == ([], [[]])


@pytest.mark.parametrize(
    "given",
    [
        {"kl": {"coef": 0.1}},
        {"kl": {"coef": 0.1, "where": "reward"}},
        {"loss": {"kind": "dro", "beta": 0.1}},
        {"off_policy": {"correct": "token_mask"}},
    ],
)
def test_unless_a_term_acts_on_them_or_a_mean_needs_them(given: dict[str, Any]):
    assert places(given, EQUAL, DIFFERENT) == [0, 0, 1, 1, 1]


def test_a_group_that_is_only_counted_costs_no_backward():
    objective = Objective(settings(off_policy={"correct": "token_mask", "max": 2.0}))
    batch = objective.batch([EQUAL, DIFFERENT])
    p = [np.full(len(one.positions), -1.0) for one in batch.sequences]
    (all_kept,) = batch.minibatches(p)
    assert all_kept.sequences == [2, 3, 4]
    # With a token of the first group rejected, a mean over one token less is taken.
    p[0][0] = 5.0
    (one_less,) = batch.minibatches(p)
    assert one_less.sequences == [2, 3, 4]
    before, after = (m.data[0].loss_inputs["advantages"] for m in (all_kept, one_less))
    np.testing.assert_allclose(after * 8, before * 9, rtol=1e-6)


def test_groups_that_teach_nothing_stay_in_the_mean():
    objective = Objective(settings(advantage={"kind": "dr_grpo"}))
    (minibatch,) = objective.batch([DIFFERENT, EQUAL]).minibatches()
    # Five tokens of the first group, four of the second.
    assert minibatch.data[0].loss_inputs["advantages"].tolist() == pytest.approx([0.5 / 9] * 2)


def test_cut_samples_are_masked_but_compared_with():
    cut = group(0, rollout(1.0), rollout(0.0, stop="length"), rollout(0.0))
    given = {"advantage": {"kind": "dr_grpo"}, "overlong": {"mask_truncated": True}}
    objective = Objective(settings(**given))
    batch = objective.batch([cut])
    (minibatch,) = batch.minibatches()
    assert [one.sample for one in batch.sequences] == [0, 2]
    assert minibatch.data[0].loss_inputs["advantages"].tolist() == pytest.approx([2 / 3 / 4] * 2)


def test_penalties_belong_to_the_reward():
    objective = Objective(settings(overlong={"penalty": 0.5}))
    cut = group(0, rollout(1.0), rollout(1.0, stop="length"))
    assert objective.rewards(cut).tolist() == [1.0, 0.5]
    assert objective.teaches(cut)


def test_a_datum_predicts_the_next_token():
    objective = Objective(settings(loss={"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1}))
    batch = objective.batch([DIFFERENT])
    asked = batch.forward_data()[1]
    assert asked.tokens.tolist() == [0, 1, 2, 3]
    assert asked.loss_inputs["target_tokens"].tolist() == [1, 2, 3, 4]
    assert asked.loss_inputs["weights"].tolist() == [0, 1, 0, 1]
    (minibatch,) = batch.minibatches([np.array([-0.5] * 2), np.array([-0.25, -0.75]), np.ones(1)])
    inputs = minibatch.data[1].loss_inputs
    assert inputs["logprobs"].tolist() == [0, -0.25, 0, -0.75]
    assert inputs["sequence_ratio_mask"].tolist() == [0, 1, 0, 1]
    assert [name for name, values in inputs.items() if values.dtype != np.float32] == [
        "target_tokens"
    ]


def test_minibatches_are_consecutive_groups_and_may_be_empty():
    objective = Objective(settings(loss={"minibatches": 2}))
    three = [DIFFERENT, DIFFERENT, EQUAL]
    batch = objective.batch(three)
    p = [np.full(len(one.positions), -1.0) for one in batch.sequences]
    first, second = batch.minibatches(p)
    assert (first.sequences, second.sequences) == ([0, 1, 2, 3, 4, 5], [])
    assert [len(one.data) for one in objective.batch([DIFFERENT]).minibatches(p[:3])] == [3, 0]


def test_sequences_in_which_nothing_is_trained_are_left_out():
    middle = group(0, rollout(1.0), rollout(0.5), rollout(0.0))
    (minibatch,) = Objective(settings()).batch([middle]).minibatches()
    assert minibatch.sequences == [0, 2]
    rejecting = Objective(settings(off_policy={"correct": "sequence_mask", "max": 2.0}))
    batch = rejecting.batch([DIFFERENT])
    p = [np.full(len(one.positions), -1.0) for one in batch.sequences]
    p[0] += 3.0
    (minibatch,) = batch.minibatches(p)
    assert minibatch.sequences == [1, 2]


@pytest.mark.parametrize("proximal", [None, [], [np.zeros(2), np.zeros(1), np.zeros(1)]])
def test_arrays_that_do_not_fit_are_refused(proximal: Any):
    batch = Objective(settings(loss={"updates": 2})).batch([DIFFERENT])
    with pytest.raises(DataError, match="proximal"):
        batch.minibatches(proximal)
    with pytest.raises(DataError, match="reference"):
        Objective(settings(kl={"coef": 0.1})).batch([DIFFERENT]).minibatches(None, proximal)


def test_dro_has_one_pull_in_the_loss():
    with pytest.raises(ValueError, match="dro has a pull of its own"):
        settings(loss={"kind": "dro", "beta": 0.1}, kl={"coef": 0.1})
    dro = Objective(settings(loss={"kind": "dro", "beta": 0.25, "aggregate": "constant"}))
    assert dro.config == {
        "clip_low_threshold": 1.0,
        "clip_high_threshold": 1.0,
        "kl_estimator": 2.0,
    }
    batch = dro.batch([DIFFERENT])
    (minibatch,) = batch.minibatches([np.full(len(one.positions), -1.0) for one in batch.sequences])
    # Prompts are not pulled.
    weights = minibatch.data[1].loss_inputs["kl_weights"]
    assert weights.tolist() == pytest.approx([0, 0.25 / 18, 0, 0.25 / 18])
