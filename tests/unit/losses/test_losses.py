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
}
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]


def inputs_of(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    logprobs_T, noise_T, signed_T = torch.randn(3, T, generator=generator, dtype=torch.float64)
    logprobs_T = logprobs_T - 4
    if name == "cross_entropy":
        return logprobs_T, {"weights": signed_T}
    return logprobs_T, {"logprobs": logprobs_T + 0.3 * noise_T, "advantages": signed_T}


def test_all_losses_are_tried():
    assert sorted(CONFIGS) == sorted(loss_names())


@pytest.mark.parametrize(("name", "config"), CASES)
def test_the_derivative_is_autograds(name: str, config: dict[str, float]):
    logprobs_T, inputs = inputs_of(name)
    loss = get_loss(name)
    loss_T, slope_T = loss.function(logprobs_T, inputs, loss.settings(config))

    leaf_T = logprobs_T.clone().requires_grad_()
    expected_T = reference_loss(name, leaf_T, inputs, config)
    (expected_slope_T,) = torch.autograd.grad(expected_T.sum(), leaf_T)
    torch.testing.assert_close(loss_T, expected_T.detach())
    torch.testing.assert_close(slope_T, expected_slope_T)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_by_hand(name: str):
    """One token with l = -1, q = -1 - ln 2 (so r = 2), A = 3 or A = -3, worked out on paper."""
    settings = get_loss(name).settings({"beta": 0.5} if name == "dro" else None)
    log2 = float(np.log(2.0))
    expected = {  # A → (loss, slope)
        "cross_entropy": {3: (3.0, -3.0), -3: (-3.0, 3.0)},
        "importance_sampling": {3: (-6.0, -6.0), -3: (6.0, 6.0)},
        "ppo": {3: (-3.6, 0.0), -3: (6.0, 6.0)},
        "cispo": {3: (6.0, -6.0), -3: (-6.0, 6.0)},
        "dro": {
            3: (3 + 0.25 * log2**2, 0.5 * log2 - 3),
            -3: (-3 + 0.25 * log2**2, 0.5 * log2 + 3),
        },
    }[name]
    for signed, (loss, slope) in expected.items():
        given = {"logprobs": -1 - log2, "advantages": float(signed), "weights": float(signed)}
        inputs = {key: torch.tensor([value], dtype=torch.float64) for key, value in given.items()}
        found = get_loss(name).function(torch.tensor([-1.0], dtype=torch.float64), inputs, settings)
        assert [float(x) for x in found] == pytest.approx([loss, slope])


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
        ("dro", {"beta": "1"}, "setting 'beta' of loss 'dro' is '1', not a number"),
        ("dro", {"beta": True}, "is True, not a number"),
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
