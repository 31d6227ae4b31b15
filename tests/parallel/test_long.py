"""Five hundred steps of a mesh whose adapters come and go: no hang, and no more memory."""

import random
from pathlib import Path

import numpy as np
import pytest

from manylora import Trainer
from manylora.api import AdapterHandle
from manylora.types import Datum, SamplingParams, causal_datum
from tests.family import below
from tests.models import TinyBases

STEPS, WARM = 500, 150
# What the four processes together may have grown by after the first steps; noise of the allocator.
MOST_BYTES = 4 * (24 << 20)


def data(draw: random.Random) -> list[Datum]:
    rng = np.random.default_rng(draw.randrange(2**31))
    lengths = [draw.choice((3, 9, 40)) for _ in range(draw.randint(1, 4))]
    return [causal_datum(rng.integers(3, 150, size=n), np.ones(n)) for n in lengths]


def resident(trainer: Trainer) -> int:
    """Bytes of the engine's processes that belong to them alone."""
    total = 0
    for pid in below(trainer._group._launcher.pid):  # type: ignore[union-attr]
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += 1024 * int(
            next(line for line in lines if line.startswith("Anonymous:")).split()[1]
        )
    return total


@pytest.mark.slow
def test_five_hundred_steps_of_a_busy_mesh(tiny: TinyBases, tmp_path: Path) -> None:
    draw = random.Random(0)
    base = tiny("qwen3", num_key_value_heads=4)
    living: dict[str, AdapterHandle] = {}
    sizes: list[int] = []
    with Trainer(base, token_budget=64, mesh="dp=2,tp=2", step_seconds=60.0, threads=1) as trainer:
        for step in range(STEPS):
            if len(living) < 2 or (len(living) < 6 and draw.random() < 0.1):
                name = f"a{step}"
                rank = draw.choice((1, 3, 16))
                living[name] = trainer.create(name, rank=rank, seed=step, dropout=0.1)
            if len(living) > 2 and draw.random() < 0.1:
                living.pop(draw.choice(sorted(living))).unload().result()
            working = [h for h in living.values() if draw.random() < 0.7]
            futures = [(h.forward_backward(data(draw)), h.optim_step(lr=1e-3)) for h in working]
            if draw.random() < 0.2:
                name = draw.choice(sorted(living))
                living[name].save(tmp_path / name / "state").result()
            if draw.random() < 0.2:
                handle = living[draw.choice(sorted(living))]
                snapshot = handle.snapshot()
                params = SamplingParams(max_tokens=4, temperature=1.0, seed=step)
                answers = snapshot.sample([[5, 6], [7]], params, num_samples=2).result()
                assert len(answers.sequences) == 4
                snapshot.drop().result()
            for loss, update in futures:
                assert np.isfinite(loss.result().loss)
                assert update.result().step >= 1
            if step >= WARM and step % 50 == 0:
                sizes.append(resident(trainer))
        sizes.append(resident(trainer))
    assert sizes[-1] - sizes[0] < MOST_BYTES, [size >> 20 for size in sizes]
