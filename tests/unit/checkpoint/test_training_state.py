"""Training state: comes back bit for bit, or is refused with the reason."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from manylora.checkpoint import load_state, newest_state, save_state, verify
from manylora.checkpoint.tensor_files import read_fp32
from manylora.lora.layout import plan_layout
from manylora.lora.sites import resolve_targets
from manylora.lora.state import AdapterState, Floats
from manylora.types import AdapterSpec, CheckpointDamaged, CheckpointMismatch, SaveFailed
from tests.unit.checkpoint.states import SITES, spec_of, state_of

FILES = ["state.safetensors", "state.json", "manifest.json"]
VECTORS = ["weights", "exp_avg", "exp_avg_sq", "grad"]


def save(folder: Path, state: AdapterState, client: dict | None = None) -> None:
    save_state(folder, state, base_name="tiny", base_fingerprint="f00d", client=client or {})


def assert_same_state(found: AdapterState, saved: AdapterState) -> None:
    for name in VECTORS:
        one, other = getattr(found, name), getattr(saved, name)
        assert (one is None) == (other is None), name
        if one is not None:
            # As bits: -0.0, NaN and denormal numbers count too.
            assert np.array_equal(one.view(np.int32), other.view(np.int32)), name
    for name in ("spec", "layout", "step", "draws", "poison"):
        assert getattr(found, name) == getattr(saved, name), name


SPECS = [
    spec_of(),
    spec_of(targets="all-linear", use_rslora=True, dropout=0.1, dtype="bf16", init="gaussian"),
    spec_of(targets=r".*\.1\..*_proj|lm_head"),
    # Both patterns match q_proj of layer 1; the first one wins, so their order must survive.
    spec_of(rank_pattern={r"layers\.1\..*q_proj": 5, "q_proj": 2}, alpha_pattern={"up_proj": 0.1}),
]


@pytest.mark.parametrize("spec", SPECS)
def test_everything_comes_back_bit_for_bit(tmp_path: Path, spec: AdapterSpec):
    state = state_of(spec)
    state.weights[:3] = [-0.0, math.nan, 1e-42]
    client = {"cursor": [1, 2, {"pi": 0.1 + 0.2}], "note": "ä", "none": None, "done": False}

    save(tmp_path / "step-4", state, client)
    found = load_state(tmp_path / "step-4", layout=state.layout, base_fingerprint="f00d", spec=spec)

    assert_same_state(found.state, state)
    assert found.client == client
    assert (found.base_name, found.base_fingerprint) == ("tiny", "f00d")
    assert list(found.state.spec.rank_pattern) == list(spec.rank_pattern)


@pytest.mark.parametrize("absent", [["grad"], ["exp_avg", "exp_avg_sq", "grad"]])
def test_what_is_not_there_stays_away(tmp_path: Path, absent: list[str]):
    state = state_of()
    for name in absent:
        setattr(state, name, None)
    save(tmp_path / "a", state)
    assert_same_state(load_state(tmp_path / "a").state, state)


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_a_gradient_of_several_shares_keeps_them_apart(tmp_path: Path, shares: int):
    state = state_of(shares=shares)
    num_params = state.layout.num_params
    save(tmp_path / "a", state)
    assert_same_state(load_state(tmp_path / "a").state, state)
    in_file = read_fp32(tmp_path / "a" / "state.safetensors")["grad"]
    assert in_file.shape == ((num_params,) if shares == 1 else (shares, num_params))


@pytest.mark.parametrize("shape", [(), (0,), (2, 1)], ids=str)
def test_a_gradient_of_another_shape_is_refused(tmp_path: Path, monkeypatch, shape):
    state = state_of()
    grad = np.zeros((*shape, state.layout.num_params), np.float32)
    with pytest.raises(SaveFailed, match="grad is"):
        save(tmp_path / "a", replace(state, grad=grad))
    if shape:  # a file may have [P]
        monkeypatch.setattr(
            "manylora.checkpoint.training_state._vectors",
            lambda state: {"weights": state.weights, "grad": grad},
        )
        save(tmp_path / "a", state)
        with pytest.raises(CheckpointMismatch, match="grad is"):
            load_state(tmp_path / "a")


def test_a_file_is_the_one_that_torch_wrote(tmp_path: Path):
    """The same bytes as when states were made of torch tensors; those of then are read."""
    state = state_of()
    assert state.exp_avg is not None and state.exp_avg_sq is not None and state.grad is not None
    save(tmp_path / "a", state)
    vectors = {
        "weights": state.weights,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "grad": state.grad[0],
    }
    save_file({k: torch.from_numpy(v) for k, v in vectors.items()}, tmp_path / "theirs")
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "a" / FILES[0]).read_bytes()


def test_why_a_step_is_refused_comes_back(tmp_path: Path):
    state = replace(state_of(), grad=None, poison="datum 3: ‘weights’ is not finite")
    save(tmp_path / "a", state)
    assert_same_state(load_state(tmp_path / "a").state, state)


@pytest.mark.parametrize(("change", "poison"), [({}, None), ({"poison": 3}, CheckpointDamaged)])
def test_an_older_state_refuses_nothing(tmp_path: Path, monkeypatch, change: dict, poison):
    """Its settings do not have the field; one of a wrong type is refused."""
    dumps = json.dumps

    def older(settings: dict, **options) -> str:
        settings.pop("poison", None)
        return dumps({**settings, **change}, **options)

    with monkeypatch.context() as patch:
        patch.setattr("manylora.checkpoint.training_state.json.dumps", older)
        save(tmp_path / "a", state_of())
    assert ("poison" in json.loads((tmp_path / "a" / "state.json").read_text())) == bool(change)
    if poison is not None:
        with pytest.raises(poison, match="poison"):
            load_state(tmp_path / "a")
    else:
        assert_same_state(load_state(tmp_path / "a").state, state_of())


def test_a_loaded_state_has_its_own_memory(tmp_path: Path):
    save(tmp_path / "a", state_of())
    found = load_state(tmp_path / "a").state
    found.weights.fill(0)
    (tmp_path / "a" / "state.safetensors").write_bytes(b"")
    found.weights[:] = state_of().weights
    assert_same_state(found, state_of())


@pytest.mark.parametrize(
    "client", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": [object()]}, {"t": np.zeros(1)}, {"b": b""}]
)
def test_notes_that_would_come_back_changed_are_refused(tmp_path: Path, client: dict):
    with pytest.raises(SaveFailed, match="client"):
        save(tmp_path / "a", state_of(), client)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "weights", [np.zeros(3, np.float32), np.zeros(state_of().layout.num_params)]
)
def test_a_vector_of_another_shape_or_dtype_is_refused(tmp_path: Path, weights: Floats):
    with pytest.raises(SaveFailed, match="weights is"):
        save(tmp_path / "a", replace(state_of(), weights=weights))


# --- damage -----------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n{}")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, empty, flip, append, Path.unlink])
def test_any_damage_is_named_and_the_one_before_serves(tmp_path: Path, caplog, name: str, harm):
    older, newer = state_of(step=9, seed=1), state_of(step=10, seed=2)
    save(tmp_path / "step-9", older)
    save(tmp_path / "step-10", newer)
    if harm is truncate and name != "state.safetensors":
        # The last byte of these is a line's end; take the brace as well.
        truncate(tmp_path / "step-10" / name)
    harm(tmp_path / "step-10" / name)

    with pytest.raises(CheckpointDamaged, match=name):
        load_state(tmp_path / "step-10")
    with caplog.at_level(logging.WARNING, logger="manylora.checkpoint"):
        newest = newest_state(tmp_path)

    assert newest == tmp_path / "step-9"
    assert "step-10" in caplog.text
    assert_same_state(load_state(tmp_path / "step-9").state, older)


@pytest.mark.parametrize("name", FILES)
def test_every_single_byte_counts(tmp_path: Path, name: str):
    """Flip one bit in many places; no place may pass."""
    save(tmp_path / "a", state_of(), {"n": 1})
    path = tmp_path / "a" / name
    data = path.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 97)):
        for bit in (0, 5):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                load_state(tmp_path / "a")
            except (CheckpointDamaged, CheckpointMismatch):
                continue
            # White space between JSON tokens says nothing.
            assert name == "manifest.json"
            assert json.loads(changed) == json.loads(data)


def test_all_faults_are_named_at_once(tmp_path: Path):
    save(tmp_path / "a", state_of())
    truncate(tmp_path / "a" / "state.safetensors")
    (tmp_path / "a" / "state.json").unlink()
    with pytest.raises(CheckpointDamaged, match=r"state\.json is missing.*state\.safetensors has"):
        load_state(tmp_path / "a")


# --- another adapter or base ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, r"rank is 3, here 4"),
        ({"alpha": 8.0}, r"alpha is 7\.5, here 8\.0"),
        ({"use_rslora": True}, r"scale is 2\.5, here 4\.3"),
        ({"targets": ("q_proj",)}, r"up_proj, here there are none"),
        ({"targets": ("q_proj", "up_proj", "lm_head")}, "no factors for lm_head"),
    ],
)
def test_another_layout_is_refused_with_both_sides(tmp_path: Path, changes: dict, message: str):
    save(tmp_path / "a", state_of())
    wanted = spec_of(**changes)
    with pytest.raises(CheckpointMismatch, match=message):
        load_state(tmp_path / "a", layout=plan_layout(wanted, resolve_targets(wanted, SITES)))


def test_the_same_factors_in_another_order_are_refused(tmp_path: Path):
    save(tmp_path / "a", state_of())
    spec = spec_of()
    backwards = plan_layout(spec, resolve_targets(spec, SITES[::-1]))
    with pytest.raises(CheckpointMismatch, match="a_start is"):
        load_state(tmp_path / "a", layout=backwards)


def test_numbers_of_input_groups_do_not_matter(tmp_path: Path):
    state = state_of()
    save(tmp_path / "a", state)
    sites = [replace(site, group=site.group + 100) for site in SITES]
    layout = plan_layout(state.spec, resolve_targets(state.spec, sites))
    assert load_state(tmp_path / "a", layout=layout).state.layout == layout


def test_another_base_dtype_or_dropout_is_refused_with_both_sides(tmp_path: Path):
    save(tmp_path / "a", state_of())
    with pytest.raises(CheckpointMismatch, match=r"base tiny \(f00d\), here is base beef"):
        load_state(tmp_path / "a", base_fingerprint="beef")
    with pytest.raises(
        CheckpointMismatch, match=r"dropout is 0\.0, here 0\.1; its dtype is 'fp32'"
    ):
        load_state(tmp_path / "a", spec=spec_of(dtype="bf16", dropout=0.1))


def test_a_folder_of_another_kind_is_refused(tmp_path: Path):
    save(tmp_path / "a", state_of())
    with pytest.raises(CheckpointMismatch, match="holds a training-state, not a merged-model"):
        verify(tmp_path / "a", kind="merged-model")


# --- the newest -------------------------------------------------------------------------------


def test_the_newest_is_the_highest_number(tmp_path: Path):
    assert newest_state(tmp_path) is None
    assert newest_state(tmp_path / "nowhere") is None
    for step in (2, 10, 9):
        save(tmp_path / f"step-{step}", state_of(step=step))
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-12-old").mkdir()
    (tmp_path / "step-13").write_text("not a folder")
    assert newest_state(tmp_path) == tmp_path / "step-10"


def test_a_newer_format_is_not_skipped(tmp_path: Path, monkeypatch):
    save(tmp_path / "step-1", state_of())
    monkeypatch.setattr("manylora.checkpoint.manifest.FORMAT", 2)
    save(tmp_path / "step-2", state_of())
    monkeypatch.undo()
    with pytest.raises(CheckpointMismatch, match="format version 2; this manylora reads 1"):
        newest_state(tmp_path)
