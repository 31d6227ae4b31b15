"""The learning rate of each step is a pure function of the step.

With w warm-up steps and n steps in all, step s (from 0) has lr times

    (s + 1) / w                          while s < w
    1                                    constant
    (n - s) / (n - w)                    linear
    ½ (1 + cos(π (s - w) / (n - w)))     cosine

From step w on these are the formulas of transformers' `get_*_schedule_with_warmup`. During the
warm-up those have s / w, so that their first step has a learning rate of zero and moves nothing;
ours is theirs of one step later.
"""

import math

from manylora.config import OptimizerSettings, Schedule


def learning_rate(
    step: int, *, lr: float, schedule: Schedule, warmup_steps: int, total_steps: int
) -> float:
    """Return the learning rate of a step, from 0; zero from `total_steps` on unless constant."""
    if step < 0:
        raise ValueError(f"step is {step}; steps are counted from 0")
    if step < warmup_steps:
        return min(lr, lr * (step + 1) / warmup_steps)  # rounding may lift the quotient above lr
    if schedule == "constant":
        return lr
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "linear":
        return lr * (1.0 - progress)
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled_lr(optimizer: OptimizerSettings, step: int, total_steps: int) -> float:
    """Return the `learning_rate` of a run file's settings."""
    return learning_rate(
        step,
        lr=optimizer.lr,
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        total_steps=total_steps,
    )
