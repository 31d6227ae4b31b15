"""PEFT folders that do not fit: every key is named, nothing is guessed. (Law 6 has the numbers.)"""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.checkpoint import export_peft, import_peft
from manylora.types import (
    CheckpointDamaged,
    CheckpointMismatch,
    NotFinite,
    SaveFailed,
    TextFormat,
    Unsupported,
)
from tests.unit.checkpoint.states import SITES, spec_of, state_of

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
UP1 = "base_model.model.model.layers.1.mlp.up_proj"
HEAD = "base_model.model.lm_head"


def export(folder: Path, **changes) -> None:
    state = state_of(spec_of(**changes))
    export_peft(folder, state.spec, state.layout, state.weights, base_name="tiny", sites=SITES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Without its sidecar, as if somebody else had written it."""
    export(tmp_path / "a")
    (tmp_path / "a" / "manylora.json").unlink()
    return tmp_path / "a"


def change_keys(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_files_of_an_export(tmp_path: Path):
    export(tmp_path / "a", rank_pattern={"up_proj": 5}, dropout=0.25)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "manylora.json"]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert tensors[f"{Q0}.lora_A.weight"].shape == (3, 8)
    assert tensors[f"{Q0}.lora_B.weight"].shape == (6, 3)
    assert tensors[f"{UP1}.lora_B.weight"].shape == (10, 5)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
        "bias": "none",
        "r": 3,
        "lora_alpha": 7.5,
        "lora_dropout": 0.25,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {},
    }
    assert {key: config[key] for key in wanted} == wanted


def test_every_wrong_key_is_reported_at_once(folder: Path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q0}.lora_B.weight"]
        tensors[f"{UP1}.lora_A.weight"] = torch.zeros(2, 8)
        tensors[f"{UP1}.lora_B.weight"] = torch.zeros(3, 10)
        tensors[f"{HEAD}.lora_A.weight"] = torch.zeros(3, 8)
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(1)
        tensors[f"{Q0}.lora_magnitude_vector"] = torch.zeros(6)
        tensors[f"{Q0}.lora_A.default.weight"] = torch.zeros(3, 8)
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(3, 8)

    change_keys(folder, change)
    with pytest.raises(CheckpointMismatch) as raised:
        import_peft(folder, SITES)
    lines = sorted(line.strip() for line in str(raised.value).splitlines()[1:])
    expected = [
        f"misshapen {UP1}.lora_A.weight (it is [2, 8], not [3, 8])",
        f"misshapen {UP1}.lora_B.weight (it is [3, 10], not [10, 3])",
        f"missing {Q0}.lora_B.weight",
        f"unexpected {HEAD}.lora_A.weight (the config does not target",
        "unexpected base_model.model.model.embed_tokens.lora_embedding_A (not a factor",
        "unexpected base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight (not a factor",
        f"unexpected {Q0}.lora_A.weight (a second one",
        f"unexpected {Q0}.lora_magnitude_vector (not a factor",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, sorted(expected), strict=True):
        assert line.startswith(start), (line, start)


def test_a_layer_that_the_config_targets_and_the_file_lacks_is_reported(folder: Path):
    change_config(folder, target_modules=["q_proj", "up_proj", "o_proj"])
    with pytest.raises(CheckpointMismatch) as raised:
        import_peft(folder, SITES)
    assert str(raised.value).count("missing") == 4  # A and B, two layers


def test_a_file_without_factors_is_refused(folder: Path):
    change_config(folder, target_modules=None)
    change_keys(folder, dict.clear)
    with pytest.raises(CheckpointMismatch, match="no factors at all"):
        import_peft(folder, SITES)


def test_rank_and_alpha_of_the_config_are_held_against_the_factors(folder: Path):
    change_config(folder, r=4)
    with pytest.raises(CheckpointMismatch, match=r"it is \[3, 8\], not \[4, 8\]"):
        import_peft(folder, SITES)


def test_keys_with_an_adapters_name_are_understood(folder: Path):
    expected_P = import_peft(folder, SITES).weights_P

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    change_keys(folder, change)
    assert np.array_equal(import_peft(folder, SITES).weights_P, expected_P)


def test_a_config_without_targets_takes_what_the_file_holds(folder: Path):
    change_config(folder, target_modules=None)
    assert import_peft(folder, SITES).spec.targets == ("q_proj", "up_proj")


def test_a_pickle_is_refused(folder: Path):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(Unsupported, match=r"adapter_model\.bin, a pickle"):
        import_peft(folder, SITES)


def test_another_kind_of_adapter_is_refused(folder: Path):
    change_config(folder, use_dora=True)
    with pytest.raises(Unsupported, match=r"adapter_config\.json.*use_dora \(DoRA"):
        import_peft(folder, SITES)


@pytest.mark.parametrize("changes", [{"lora_alpha": 0}, {"lora_alpha": -4}, {"lora_dropout": 1.0}])
def test_settings_that_no_adapter_can_have_are_refused(folder: Path, changes: dict):
    change_config(folder, **changes)
    with pytest.raises(Unsupported, match="it must"):
        import_peft(folder, SITES)


def test_another_dtype_is_refused_and_mixed_ones_are_fp32(folder: Path):
    change_keys(
        folder, lambda t: t.update({f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"].half()})
    )
    assert import_peft(folder, SITES).spec.dtype == "fp32"
    assert import_peft(folder, SITES, dtype="bf16", seed=9).spec.dtype == "bf16"
    assert import_peft(folder, SITES, dtype="bf16", seed=9).spec.seed == 9
    change_keys(
        folder, lambda t: t.update({f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"].double()})
    )
    with pytest.raises(Unsupported, match="F64"):
        import_peft(folder, SITES)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"\x08")])
def test_a_torn_folder_is_damaged(folder: Path, name: str, harm):
    harm(folder / name)
    with pytest.raises(CheckpointDamaged, match=name):
        import_peft(folder, SITES)


def test_a_folder_that_is_not_there_is_damaged(tmp_path: Path):
    with pytest.raises(CheckpointDamaged, match=r"adapter_config\.json is missing"):
        import_peft(tmp_path / "nowhere", SITES)


def test_a_flipped_bit_shows_in_our_own_folders(tmp_path: Path):
    export(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"adapter_model\.safetensors was altered.*delete"):
        import_peft(tmp_path / "a", SITES)
    (tmp_path / "a" / "manylora.json").unlink()
    import_peft(tmp_path / "a", SITES)


def test_numbers_that_are_not_finite_do_not_pass(tmp_path: Path, folder: Path):
    change_keys(folder, lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointDamaged, match="NaN or Inf"):
        import_peft(folder, SITES)
    state = state_of(spec_of(dtype="fp16"))
    state.weights[5] = 1e6  # finite in fp32, not in fp16
    with pytest.raises(NotFinite, match="fp16"):
        export_peft(
            tmp_path / "b", state.spec, state.layout, state.weights, base_name="t", sites=SITES
        )
    assert not (tmp_path / "b").exists()


def test_weights_or_sites_of_another_base_are_refused(tmp_path: Path):
    state = state_of()
    with pytest.raises(CheckpointMismatch, match="the layout needs"):
        export_peft(
            tmp_path / "a", state.spec, state.layout, state.weights[:-1], base_name="t", sites=SITES
        )
    with pytest.raises(CheckpointMismatch, match="no linear layers"):
        export_peft(
            tmp_path / "a", state.spec, state.layout, state.weights, base_name="t", sites=SITES[3:]
        )


def test_somebody_elses_adapter_is_not_overwritten(folder: Path):
    with pytest.raises(SaveFailed, match=r"has no manylora\.json"):
        export(folder)


@pytest.mark.parametrize("file", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_may_have_been_rounded_by_either_side(folder: Path, base, file):
    head = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    change_config(folder, target_modules=["q_proj", "up_proj", "lm_head"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{HEAD}.lora_A.weight"] = torch.ones(3, 8)
        tensors[f"{HEAD}.lora_B.weight"] = torch.ones(20, 3)
        tensors[f"{HEAD}.base_layer.weight"] = head.to(file)

    change_keys(folder, change)
    if {base, file} == {torch.bfloat16, torch.float16}:  # neither comes from the other
        own = head.to(file).to(base)
    else:
        own = head.to(base)
    import_peft(folder, SITES, base_weight=lambda site: own.float().numpy())
    nearly = own.clone()
    nearly.view(-1)[7] *= 1.1
    with pytest.raises(CheckpointMismatch, match="another lm_head weight"):
        import_peft(folder, SITES, base_weight=lambda site: nearly.float().numpy())


def test_a_copy_of_the_head_is_compared_or_warned_of(folder: Path, caplog):
    head = torch.randn(20, 8)
    change_config(folder, target_modules=["q_proj", "up_proj", "lm_head"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{HEAD}.lora_A.weight"] = torch.ones(3, 8)
        tensors[f"{HEAD}.lora_B.weight"] = torch.ones(20, 3)
        tensors[f"{HEAD}.base_layer.weight"] = head.bfloat16()

    change_keys(folder, change)
    import_peft(folder, SITES, base_weight=lambda site: head.numpy())
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, logger="manylora.checkpoint"):
        import_peft(folder, SITES)
    assert "was not compared" in caplog.text
    with pytest.raises(CheckpointMismatch, match="another lm_head weight"):
        import_peft(folder, SITES, base_weight=lambda site: (head + 0.1).numpy())


SLOW = r"((.|\w)*)*[0-9]"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("target_modules", {"target_modules": SLOW}),
        ("exclude_modules", {"exclude_modules": SLOW}),
        ("rank_pattern", {"rank_pattern": {SLOW: 3}}),
        ("alpha_pattern", {"alpha_pattern": {SLOW: 3}}),
        ("layers_pattern", {"layers_pattern": [SLOW], "layers_to_transform": [0]}),
    ],
)
def test_a_pattern_that_would_never_end_is_named(folder: Path, field: str, changes: dict):
    change_config(folder, **changes)
    with pytest.raises(CheckpointDamaged, match=f"adapter_config.json: {field} is .*too long"):
        import_peft(folder, SITES)


def sparse(folder: Path, num_bytes: int, shapes: dict[str, list[int]] | None = None) -> None:
    """A weights file of so many bytes, nearly all of them a hole."""
    rest = num_bytes // 4
    header, place = {}, 0
    for key, shape in (shapes or {"base_model.model.x.lora_A.weight": [rest]}).items():
        end = place + 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def test_a_huge_file_that_does_not_fit_is_not_read(folder: Path):
    sparse(folder, 40 << 30)
    with pytest.raises(CheckpointMismatch, match="unexpected base_model"):
        import_peft(folder, SITES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xff\xff\xff\x00\x00\x00\x00" + b"{" * 64, "its header claims"),
        ((1 << 23).to_bytes(8, "little") + b"{}", "cannot be read"),
        ((2).to_bytes(8, "little") + b"{}" + b"\0" * 64, "cannot be read"),
        ((30_000).to_bytes(8, "little") + b'{"a":' * 6000, "cannot be read"),
    ],
)
def test_a_header_is_held_against_the_file(folder: Path, content: bytes, words: str):
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=rf"adapter_model.safetensors .*{words}"):
        import_peft(folder, SITES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000 + "]" * 200_000, "be read"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested deeper"),
        ('{"a": "' + "x" * (5 << 20) + '"}', "more than"),
        ('{"r": ' + "9" * 10_000 + "}", "be read"),
    ],
)
def test_a_config_is_bounded(folder: Path, text: str, words: str):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointDamaged, match=f"adapter_config.json cannot .*{words}"):
        import_peft(folder, SITES)


def test_a_pipe_is_not_waited_for(folder: Path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointDamaged, match=name):
            import_peft(folder, SITES)


def test_how_its_texts_became_tokens_comes_back(tmp_path: Path):
    state = state_of(spec_of())
    wanted = TextFormat((2, 7), "{{ messages }}\n")
    export_peft(
        tmp_path / "a", state.spec, state.layout, state.weights, base_name="tiny", sites=SITES,
        text_format=wanted,
    )  # fmt: skip
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == "{{ messages }}\n"
    assert import_peft(tmp_path / "a", SITES).text_format == wanted
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(CheckpointDamaged, match=r"chat_template\.jinja"):
        import_peft(tmp_path / "a", SITES)
    export(tmp_path / "b")
    assert import_peft(tmp_path / "b", SITES).text_format == TextFormat()
