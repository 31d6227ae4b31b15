"""Each loss against autograd of its formula, and what clients are told when they ask wrongly.

T tokens.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.engine.reference import reference_loss
from manylora.losses import get_loss, loss_names
from manylora.types import DataError, Datum

T = 400
CONFIGS: dict[str, list[dict[str, float]]] = {
    "cross_entropy": [{}],
    "importance_sampling": [{}],
    "ppo": [{}, {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}],
    "cispo": [{}, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}],
    "dro": [{"beta": 0.0}, {"beta": 0.7}],
    "gspo": [
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        {"clip_low_threshold": 1.1, "clip_high_threshold": 1.2},
        {"clip_low_threshold": 0.8, "clip_high_threshold": 0.9},
    ],
}
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]


def inputs_of(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    logprobs_T, noise_T, signed_T = torch.randn(3, T, generator=generator, dtype=torch.float64)
    logprobs_T = logprobs_T - 4
    if name == "cross_entropy":
        return logprobs_T, {"weights": signed_T}
    inputs = {"logprobs": logprobs_T + 0.3 * noise_T, "advantages": signed_T}
    if name == "gspo":
        inputs["sequence_ratio_mask"] = (noise_T > 0.5).double()
    return logprobs_T, inputs


def test_all_losses_are_tried():
    assert sorted(CONFIGS) == sorted(loss_names())


@pytest.mark.parametrize(("name", "config"), CASES)
def test_the_derivative_is_autograds(name: str, config: dict[str, float]):
    logprobs_T, inputs = inputs_of(name)
    loss = get_loss(name)
    made = {key: make(logprobs_T, inputs, [T]) for key, make in loss.sequence_inputs.items()}
    loss_T, slope_T = loss.function(logprobs_T, {**inputs, **made}, loss.settings(config))

    leaf_T = logprobs_T.clone().requires_grad_()
    expected_T = reference_loss(name, leaf_T, inputs, config)
    (expected_slope_T,) = torch.autograd.grad(expected_T.sum(), leaf_T)
    torch.testing.assert_close(loss_T, expected_T.detach())
    torch.testing.assert_close(slope_T, expected_slope_T)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_by_hand(name: str):
    """One token with l = -1, q = -1 - ln 2 (so r = 2), A = 3 or A = -3, worked out on paper."""
    clips = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    settings = get_loss(name).settings({"dro": {"beta": 0.5}, "gspo": clips}.get(name))
    log2 = float(np.log(2.0))
    expected = {  # A → (loss, slope)
        "cross_entropy": {3: (3.0, -3.0), -3: (-3.0, 3.0)},
        "importance_sampling": {3: (-6.0, -6.0), -3: (6.0, 6.0)},
        "ppo": {3: (-3.6, 0.0), -3: (6.0, 6.0)},
        "gspo": {3: (-3.6, 0.0), -3: (6.0, 6.0)},
        "cispo": {3: (6.0, -6.0), -3: (-6.0, 6.0)},
        "dro": {
            3: (3 + 0.25 * log2**2, 0.5 * log2 - 3),
            -3: (-3 + 0.25 * log2**2, 0.5 * log2 + 3),
        },
    }[name]
    for signed, (loss, slope) in expected.items():
        given = {"logprobs": -1 - log2, "advantages": float(signed), "weights": float(signed)}
        given["sequence_log_ratio"] = log2
        inputs = {key: torch.tensor([value], dtype=torch.float64) for key, value in given.items()}
        found = get_loss(name).function(torch.tensor([-1.0], dtype=torch.float64), inputs, settings)
        assert [float(x) for x in found] == pytest.approx([loss, slope])


def test_a_sequences_ratio_is_the_mean_over_its_mask():
    logprobs_T = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    inputs = {
        "logprobs": torch.tensor([-1.5, 9.0, -2.0, -1.0, -1.0, -1.0, 0.0]),
        "sequence_ratio_mask": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
    }
    # Of three tokens, two (the last of which counts alone) and one without any mask; then padding.
    found = get_loss("gspo").sequence_inputs["sequence_log_ratio"](logprobs_T, inputs, [3, 2, 1])
    assert found.tolist() == [-0.25, -0.25, -0.25, -4.0, -4.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["ppo", "gspo"])
@pytest.mark.parametrize(("advantage", "ratio"), [(1.0, 1.5), (-1.0, 0.5)])
def test_a_clipped_token_has_no_gradient(name: str, advantage: float, ratio: float):
    """The loss is the held one's, and pushes no further; on the other side it pulls back."""
    loss = get_loss(name)
    settings = loss.settings({"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
    log_ratio = torch.tensor([ratio]).log()
    given = {"logprobs": -1 - log_ratio, "sequence_log_ratio": log_ratio}
    for sign, slope in ((1.0, 0.0), (-1.0, advantage * ratio)):
        advantages = torch.tensor([sign * advantage])
        _, found = loss.function(
            torch.tensor([-1.0]), {**given, "advantages": advantages}, settings
        )
        assert found.tolist() == pytest.approx([slope])


def test_negative_weights_push_away():
    _, slope_T = get_loss("cross_entropy").function(
        torch.tensor([-1.0, -1.0]), {"weights": torch.tensor([2.0, -2.0])}, {}
    )
    assert slope_T.tolist() == [-2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("dro", {}, "loss 'dro' needs the setting 'beta'; it has no default"),
        ("ppo", {"clip": 1.0}, "has no setting 'clip'; it takes: clip_high_threshold, clip_low"),
        ("cross_entropy", {"beta": 1.0}, "has no setting 'beta'; it takes: none"),
        ("dro", {"beta": "1"}, "setting 'beta' of loss 'dro' is '1', not a finite number"),
        ("dro", {"beta": True}, "is True, not a finite number"),
        ("dro", {"beta": None}, "is None, not a finite number"),
        ("dro", {"beta": float("nan")}, "is nan, not a finite number"),
        ("ppo", {"clip_high_threshold": float("inf")}, "is inf, not a finite number"),
        ("dro", {"beta": 10**400}, "not a finite number"),
        ("gspo", {}, "loss 'gspo' needs the setting 'clip_low_threshold'; it has no default"),
        ("gspo", {"clip_low_threshold": 0.8}, "needs the setting 'clip_high_threshold'"),
        ("gspo", {"beta": 1.0}, "loss 'gspo' has no setting 'beta'; it takes: clip_high"),
    ],
)
def test_settings_are_checked(name: str, config: dict, message: str):
    with pytest.raises(DataError) as caught:
        get_loss(name).settings(config)
    assert message in str(caught.value)


def test_defaults_fill_in_what_is_not_given():
    assert get_loss("ppo").settings({"clip_high_threshold": 2}) == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 2,
    }
    assert get_loss("cispo").settings(None)["clip_high_threshold"] == 4.0


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(DataError) as caught:
        get_loss("kl")
    assert all(name in str(caught.value) for name in loss_names())


def test_inputs_are_checked_by_name():
    tokens = np.array([1, 2])
    datum = Datum(tokens, {"target_tokens": tokens, "weights": np.ones(2)})
    get_loss("cross_entropy").check(datum)
    with pytest.raises(DataError, match="'ppo' needs the input 'logprobs'"):
        get_loss("ppo").check(datum)
    both = Datum(tokens, {**datum.loss_inputs, "advantages": np.ones(2)})
    with pytest.raises(
        DataError, match="has no input 'advantages'; it takes: target_tokens, weights"
    ):
        get_loss("cross_entropy").check(both)


def datum(**inputs: list) -> Datum:
    tokens = np.array([1, 2])
    given = {name: np.array(value) for name, value in inputs.items()}
    return Datum(tokens, {"target_tokens": tokens, **given})


POLICY: dict[str, list] = {"logprobs": [-1.0, -1.0], "advantages": [1.0, 0.0]}
SEVERAL: dict[str, list] = {"target_tokens": [[1, 2, 3], [4, 5, 6]]}


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("cross_entropy", {"weights": [1.0, float("nan")]}, "'weights' is not finite: nan at [1]"),
        ("cross_entropy", {"weights": [1e39, 1.0]}, "'weights' is not finite: inf at [0]"),
        (
            "cross_entropy",
            {**SEVERAL, "weights": [[0, 0, 0], [0, 0, -np.inf]]},
            "'weights' is not finite: -inf at [1, 2]",
        ),
        ("ppo", {**POLICY, "logprobs": [float("nan"), 1.0]}, "'logprobs' is not finite"),
        ("dro", {**POLICY, "advantages": [1.0, float("inf")]}, "'advantages' is not finite"),
        ("ppo", {**POLICY, **SEVERAL}, "'ppo' takes one target per token; 'target_tokens' has"),
        ("gspo", POLICY, "loss 'gspo' needs the input 'sequence_ratio_mask'"),
        ("ppo", {**POLICY, "sequence_ratio_mask": [1, 1]}, "has no input 'sequence_ratio_mask'"),
        ("ppo", {**POLICY, "sequence_log_ratio": [1, 1]}, "has no input 'sequence_log_ratio'"),
        (
            "gspo",
            {**POLICY, "sequence_ratio_mask": [0, 0]},
            "'sequence_ratio_mask' of loss 'gspo' must be 0 or 1 for each token, and 1 for at",
        ),
        ("gspo", {**POLICY, "sequence_ratio_mask": [0.5, 1]}, "must be 0 or 1 for each token"),
        (
            "gspo",
            {**POLICY, "sequence_ratio_mask": [float("nan"), 1]},
            "'sequence_ratio_mask' is not finite",
        ),
    ],
)
def test_inputs_are_checked_by_value(name: str, inputs: dict, message: str):
    with pytest.raises(DataError) as caught:
        get_loss(name).check(datum(**inputs))
    assert message in str(caught.value)


def test_inputs_that_are_sound():
    get_loss("cross_entropy").check(datum(**SEVERAL, weights=[[1, 0, -2], [0, 0, 0]]))
    get_loss("cross_entropy").check(datum(target_tokens=[[1], [2]], weights=[[1.0], [0.0]]))
    get_loss("gspo").check(datum(**POLICY, sequence_ratio_mask=[False, True]))
