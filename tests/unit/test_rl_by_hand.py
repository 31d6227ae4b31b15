"""GRPO by hand trains the very ids that were sampled, with the log-probabilities that they had."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import manylora
from examples import rl_by_hand
from manylora.types import SampledSequence

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sequences, and a reward that differs within a group from the first step on."""
    monkeypatch.setattr(rl_by_hand, "GROUPS", 2)
    monkeypatch.setattr(rl_by_hand, "GROUP_SIZE", 4)
    monkeypatch.setattr(rl_by_hand, "MAX_TOKENS", 12)
    monkeypatch.setattr(rl_by_hand, "digits", lambda text: text.count("e") / 10 + len(text) / 100)


def test_sampler_and_trainer_agree_and_the_weights_move(tmp_path: Path) -> None:
    """Planted: inputs one position late (gap 24), sampling at T = 0.8 (0.7), an optimizer step
    between sampling and training (1.1)."""
    with manylora.Trainer("seedling") as trainer:
        adapter = trainer.create("letters", rank=4, alpha=8)
        steps = [rl_by_hand.take_step(trainer, adapter, number) for number in range(3)]
        exported = load_file(adapter.export(tmp_path / "a").result() / "adapter_model.safetensors")
    assert all(np.isfinite(step.reward) for step in steps)
    # The sampler reads a cache and the trainer whole sequences, so they differ by fp32's rounding.
    assert all(0 <= step.gap < 1e-4 for step in steps)
    assert all(step.grad_norm > 0 for step in steps)
    moved = [np.abs(values).max() > 0 for name, values in exported.items() if "lora_B" in name]
    assert moved
    assert all(moved)


def test_a_line_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rl_by_hand.py", "--steps", "2"])
    rl_by_hand.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["step 1", "step 2"]
    assert all(float(line.split()[3].strip(",")) > 0 for line in lines)


def test_advantages_by_hand() -> None:
    found = rl_by_hand.advantages(np.array([0.0, 0.0, 0.0, 4.0]))
    np.testing.assert_allclose(found, [-0.5, -0.5, -0.5, 1.5], rtol=1e-5)
    # The mean of equal numbers is not always that number.
    assert not rl_by_hand.advantages(np.full(3, 0.1)).any()


def test_only_what_was_sampled_is_trained() -> None:
    answer = SampledSequence((7, 8), (-1.0, -2.0), "length")
    datum = rl_by_hand.policy_datum([4, 5, 6], answer, 0.5)
    assert datum.tokens.tolist() == [4, 5, 6, 7]
    assert {name: column.tolist() for name, column in datum.loss_inputs.items()} == {
        "target_tokens": [5, 6, 7, 8],
        "logprobs": [0, 0, -1, -2],
        "advantages": [0, 0, 0.5, 0.5],
    }
