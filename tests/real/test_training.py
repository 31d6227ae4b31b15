"""Runs on the real base: against a plain PEFT loop, killed and resumed, in 4 bits, and in parts."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import manylora
from tests.real.plain_peft import PlainPeft
from tests.real.tenants import TENANTS, column, finished, rows, run_file, steps_of, train

pytestmark = pytest.mark.real

STEPS = 4


@pytest.fixture(scope="module")
def trained(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run in fp32."""
    folder = tmp_path_factory.mktemp("trained")
    finished(train(folder, run_file(folder, real_base, "out", steps=STEPS)))
    return folder / "out"


@pytest.fixture(scope="module")
def first_factors(
    real_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """Every tenant's factors before its first step, as an export names them."""
    folder = tmp_path_factory.mktemp("first")
    found = {}
    with manylora.Trainer(real_base, threads=1) as trainer:
        for seed, (name, settings) in enumerate(TENANTS.items()):
            adapter = trainer.create(name, seed=seed, **settings)
            path = adapter.export(folder / name).result()
            found[name] = load_file(Path(path) / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("name", TENANTS)
def test_losses_are_those_of_a_plain_peft_loop(
    name: str, real_base: Path, trained: Path, first_factors: dict[str, dict[str, torch.Tensor]]
):
    torch.set_num_threads(1)
    plain = PlainPeft(real_base, TENANTS[name], first_factors[name])
    expected = plain.steps(rows(name), STEPS)
    ours = steps_of(trained, name)
    # Thirty layers of fp32 in two orders of summation; AdamW turns what is nearly nothing in a
    # gradient into a whole step, so norms drift apart sooner than losses do.
    losses = [loss for loss, _ in expected]
    assert column(ours, "loss") == pytest.approx(losses, rel=2e-4, abs=2e-4)
    assert column(ours, "grad_norm") == pytest.approx([norm for _, norm in expected], rel=5e-3)
    assert ours[-1]["loss"] < 0.8 * ours[0]["loss"]


def test_a_killed_run_ends_with_the_same_bits(real_base: Path, trained: Path, tmp_path: Path):
    run = run_file(tmp_path, real_base, "out", steps=STEPS)
    process = train(tmp_path, run)
    assert process.stdout is not None
    done = (json.loads(line) for line in process.stdout)
    # Some tenant's third step is behind its saved second one.
    next(e for e in done if e["event"] == "step_done" and e["step"] == 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished(train(tmp_path, run))
    for name in TENANTS:
        whole, resumed = (
            (out / name / "final" / "adapter_model.safetensors").read_bytes()
            for out in (trained, tmp_path / "out")
        )
        assert whole == resumed


def test_a_base_in_4_bits_learns(real_base: Path, trained: Path, tmp_path: Path):
    run = run_file(tmp_path, real_base, "out", steps=STEPS, quantization="nf4")
    finished(train(tmp_path, run))
    for name in TENANTS:
        mine, whole = (column(steps_of(out, name), "loss") for out in (tmp_path / "out", trained))
        assert mine[0] != whole[0]  # 4 bits are not the same base …
        assert mine[0] < 2 * whole[0]  # … but near it
        assert mine[-1] < 0.8 * mine[0]


def test_three_processes_train_as_one(real_base: Path, trained: Path, tmp_path: Path):
    run = run_file(tmp_path, real_base, "out", steps=STEPS, mesh="tp=3")
    finished(train(tmp_path, run))
    for name in TENANTS:
        mine, whole = (steps_of(out, name) for out in (tmp_path / "out", trained))
        assert column(mine, "loss") == pytest.approx(column(whole, "loss"), rel=2e-4, abs=2e-4)
        assert column(mine, "grad_norm") == pytest.approx(column(whole, "grad_norm"), rel=5e-3)
