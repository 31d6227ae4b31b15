"""Learning rates, beside those of torch and transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from manylora.config import OptimizerSettings
from manylora.runs.schedule import learning_rate, scheduled_lr

LR = 3e-3


def theirs(schedule: str, warmup: int, total: int) -> list[float]:
    """What transformers gives for steps 0 to total + 2."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, total),
    }[schedule]()
    rates = []
    for _ in range(total + 3):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def ours(schedule, step: int, warmup: int, total: int) -> float:
    return learning_rate(step, lr=LR, schedule=schedule, warmup_steps=warmup, total_steps=total)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (1, 10), (4, 10), (9, 10)])
def test_as_transformers_but_the_warm_up_is_a_step_ahead(schedule, warmup, total):
    reference = theirs(schedule, warmup, total)
    for step in range(total):
        expected = reference[step + 1] if step < warmup else reference[step]
        assert ours(schedule, step, warmup, total) == pytest.approx(expected, rel=1e-12), step


def test_linear_without_warm_up_is_torch_s_linear_lr():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
    for step in range(10):
        assert ours("linear", step, 0, 8) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 30),
    total=st.integers(1, 40),
    step=st.integers(0, 60),
)
def test_limits(schedule, warmup, total, step):
    rate = ours(schedule, step, warmup, total)
    assert 0.0 <= rate <= LR
    if step < total:
        assert rate > 0.0  # no step of a run is wasted
    later = ours(schedule, step + 1, warmup, total)
    assert later >= rate if step + 1 < warmup else later <= rate
    if schedule != "constant" and step >= max(total, warmup):
        assert rate == 0.0


def test_warm_up_rises_evenly_to_the_full_rate():
    shares = [ours("cosine", step, 4, 100) / LR for step in range(4)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert ours("cosine", 4, 4, 100) == LR


def test_a_warm_up_longer_than_the_run_never_falls():
    assert [ours("linear", step, 10, 3) for step in (0, 1, 2)] == [LR * n / 10 for n in (1, 2, 3)]


def test_with_a_run_file_s_settings():
    settings = OptimizerSettings(lr=1.0, schedule="linear", warmup_steps=2)
    assert [scheduled_lr(settings, step, 4) for step in range(5)] == [0.5, 1.0, 1.0, 0.5, 0.0]


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="counted from 0"):
        ours("linear", -1, 0, 4)
