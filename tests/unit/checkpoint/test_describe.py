"""`describe` tells what is there, and says of damage what it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manylora.checkpoint import describe, export_peft, save_state, write_folder
from manylora.types import CheckpointDamaged
from tests.unit.checkpoint.states import SITES, spec_of, state_of


def state_folder(folder: Path) -> Path:
    spec = spec_of(rank_pattern={"up_proj": 5}, dtype="bf16")
    save_state(folder, state_of(spec), base_name="tiny", base_fingerprint="f00d", client={"n": 1})
    return folder


def peft_folder(folder: Path) -> Path:
    spec = spec_of(alpha_pattern={"up_proj": 2.5}, dtype="bf16")
    state = state_of(spec)
    export_peft(
        folder,
        spec,
        state.layout,
        state.weights,
        base_name="tiny",
        sites=SITES,
        base_fingerprint="f00d",
    )
    return folder


def model_folder(folder: Path) -> Path:
    about = {"base_name": "tiny", "base_fingerprint": "f00d"}
    with write_folder(
        folder, kind="merged-model", about=about, manifest_name="manylora.json"
    ) as partial:
        (partial / "config.json").write_text("{}")
        save_file({"w": torch.zeros(3, 4), "b": torch.zeros(3)}, partial / "model.safetensors")
    return folder


def test_a_training_state(tmp_path: Path):
    found = describe(state_folder(tmp_path / "step-4"))
    wanted = {
        "kind": "training-state",
        "base": "tiny",
        "base_fingerprint": "f00d",
        "rank": 3,
        "ranks": [3, 5],
        "alpha": 7.5,
        "alphas": [7.5],
        "targets": ["q_proj", "up_proj"],
        "parameters": 2 * (3 * 14 + 5 * 18),
        "dtype": "bf16",
        "step": 4,
        "verified": True,
        "reason": None,
    }
    assert {key: found[key] for key in wanted} == wanted
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "step-4").iterdir())
    assert json.loads(json.dumps(found)) == found


def test_an_adapter(tmp_path: Path):
    found = describe(peft_folder(tmp_path / "a"))
    wanted = {
        "kind": "peft-adapter",
        "base": "tiny",
        "base_fingerprint": "f00d",
        "rank": 3,
        "ranks": [3],
        "alphas": [2.5, 7.5],
        "targets": ["q_proj", "up_proj"],
        "parameters": 2 * (3 * 14 + 3 * 18),
        "dtype": "bf16",
        "step": None,
        "verified": True,
    }
    assert {key: found[key] for key in wanted} == wanted
    assert json.loads(json.dumps(found)) == found


def test_an_adapter_of_somebody_else_is_not_called_verified(tmp_path: Path):
    (peft_folder(tmp_path / "a") / "manylora.json").unlink()
    found = describe(tmp_path / "a")
    assert found["verified"] is False
    assert "there is no manylora.json" in str(found["reason"])
    assert found["parameters"] == 2 * (3 * 14 + 3 * 18)


def test_models(tmp_path: Path):
    found = describe(model_folder(tmp_path / "m"))
    assert (found["kind"], found["parameters"], found["dtype"]) == ("merged-model", 15, "fp32")
    assert (found["verified"], found["base"]) == (True, "tiny")
    (tmp_path / "m" / "manylora.json").unlink()
    assert describe(tmp_path / "m")["kind"] == "model"


@pytest.mark.parametrize("make", [state_folder, peft_folder, model_folder])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"\xff" * 40)])
def test_damage_to_any_file_is_told(tmp_path: Path, make, harm):
    names = [path.name for path in make(tmp_path / "whole").iterdir()]
    for name in names:
        folder = make(tmp_path / name)
        harm(folder / name)
        if (folder / name).exists() or name not in ("manylora.json", "config.json"):
            found = describe(folder)
            assert found["verified"] is False, name
            assert name in str(found["reason"])


def test_any_other_folder_is_an_error(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointDamaged, match="holds no adapter"):
            describe(folder)
