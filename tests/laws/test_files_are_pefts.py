"""Law 6: the files are PEFT's.

What is exported is loaded by stock PEFT, what stock PEFT saved is imported, and the logits are
those of a sum made by hand. Tolerance: fp32 sums in another order, 1e-5 on logits of the size of 1.

Faults that were planted and seen to fail here: B not transposed, rsLoRA not folded, a leaf name
written for a subset of its layers, alpha_pattern and rank_pattern left out, unescaped full names
without an anchor, the scale left out of the merge, the head left tied in the merge.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from manylora.checkpoint import export_peft, import_peft
from manylora.checkpoint.merged import export_merged
from manylora.lora.layout import Layout, plan_layout
from manylora.lora.sites import resolve_targets
from manylora.lora.state import Floats
from manylora.types import AdapterSpec, CheckpointMismatch
from tests.laws.peft_oracle import acting_weights, logits_of, sites_of, summed_logits, tiny_base

ATOL = 1e-5
FAMILIES = ["llama", "qwen3", "phi3", "granite", "cohere"]
TIED = ("qwen3", "cohere")

# Two leaf names of each family, the first from attention; both are in every layer.
LEAVES = {
    "llama": ("q_proj", "up_proj"),
    "qwen3": ("v_proj", "down_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "granite": ("q_proj", "up_proj"),
    "cohere": ("v_proj", "down_proj"),
}


def specs(family: str) -> dict[str, AdapterSpec]:
    one, two = LEAVES[family]
    return {
        "all-linear": AdapterSpec(rank=4, alpha=8),
        "leaves": AdapterSpec(rank=3, alpha=5.5, targets=(one, two)),
        "regex, some layers": AdapterSpec(
            rank=2, alpha=4, targets=rf"model\.layers\.[02]\..*{one}"
        ),
        "head": AdapterSpec(rank=5, alpha=9, targets=(one, "lm_head")),
        "patterns": AdapterSpec(
            rank=4,
            alpha=8,
            rank_pattern={rf"layers\.1\..*{one}": 7, two: 2},
            alpha_pattern={rf"layers\.2\..*{one}": 3.25, "o_proj": 16},
        ),
        "rslora": AdapterSpec(rank=9, alpha=7, use_rslora=True),
        "rslora, mixed ranks": AdapterSpec(
            rank=4, alpha=3, use_rslora=True, rank_pattern={one: 13, rf"layers\.0\..*{two}": 6}
        ),
        "all and head": AdapterSpec(rank=2, alpha=3, targets=r".*_proj|lm_head", use_rslora=True),
    }


CASES = [(family, name) for family in FAMILIES for name in specs(family)]
MERGED = [(family, name) for family, name in CASES if name in ("head", "patterns", "all and head")]


@pytest.fixture(scope="module")
def bases() -> dict[str, PreTrainedModel]:
    return {family: tiny_base(family) for family in FAMILIES}


def adapter(spec: AdapterSpec, base: PreTrainedModel) -> tuple[Layout, Floats]:
    layout = plan_layout(spec, resolve_targets(spec, sites_of(base)))
    return layout, acting_weights(layout)


def weight_of(base: PreTrainedModel, site: str) -> Floats:
    return base.get_parameter(f"{site}.weight").detach().numpy()


def load_in_peft(folder: Path, family: str) -> PeftModel:
    """Stock PEFT on a fresh base; whatever it has to complain of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Said of every adapter on a tied head; what it fears is checked here by the logits.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(tiny_base(family), folder).eval()


def assert_same(found_BSV: torch.Tensor, expected_BSV: torch.Tensor) -> None:
    torch.testing.assert_close(found_BSV, expected_BSV, atol=ATOL, rtol=0)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_peft_loads_what_we_export(bases, tmp_path: Path, family: str, name: str):
    base, spec = bases[family], specs(family)[name]
    layout, weights_P = adapter(spec, base)
    expected_BSV = summed_logits(base, layout, weights_P)
    assert (expected_BSV - logits_of(base)).abs().max() > 0.1  # an adapter that is lost must show

    export_peft(tmp_path / "a", spec, layout, weights_P, base_name="tiny", sites=sites_of(base))
    loaded = load_in_peft(tmp_path / "a", family)

    assert_same(logits_of(loaded), expected_BSV)
    adapted = {n for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted == {factor.site for factor in layout.factors}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_we_import_what_we_exported(bases, tmp_path: Path, family: str, name: str):
    base, spec = bases[family], specs(family)[name]
    layout, weights_P = adapter(spec, base)
    export_peft(tmp_path / "a", spec, layout, weights_P, base_name="tiny", sites=sites_of(base))

    back = import_peft(tmp_path / "a", sites_of(base))

    assert np.array_equal(back.weights_P, weights_P)
    assert [(f.site, f.rank, f.scale) for f in back.layout.factors] == [
        (f.site, f.rank, f.scale) for f in layout.factors
    ]
    assert back.base_name == "tiny"


def peft_configs(family: str) -> dict[str, LoraConfig]:
    one, two = LEAVES[family]
    common = {"task_type": "CAUSAL_LM", "init_lora_weights": False}  # B ≠ 0
    return {
        "list": LoraConfig(r=4, lora_alpha=6, target_modules=[one, two], **common),
        "regex": LoraConfig(r=3, target_modules=rf".*\.[12]\..*{two}", **common),
        "all-linear": LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", **common),
        "patterns": LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=[one, two],
            # The first match wins; the second entry matches too.
            rank_pattern={rf"model\.layers\.0\..*{one}": 5, one: 3},
            alpha_pattern={f"^model.layers.1.*{two}": 20, two: 2},
            **common,
        ),
        "rslora": LoraConfig(
            r=9,
            lora_alpha=4,
            target_modules=[one, two],
            use_rslora=True,
            rank_pattern={two: 5},
            **common,
        ),
        "some layers": LoraConfig(
            r=4,
            target_modules=[one, two],
            layers_to_transform=[0, 2],
            layers_pattern="layers",
            **common,
        ),
        "one layer": LoraConfig(r=4, target_modules=[one], layers_to_transform=1, **common),
        "excluded": LoraConfig(
            r=4, target_modules="all-linear", exclude_modules=rf".*layers\.1\..*{one}", **common
        ),
        "head": LoraConfig(r=4, target_modules=[one, "lm_head"], **common),
    }


def save_with_peft(config: LoraConfig, family: str, folder: Path) -> torch.Tensor:
    """Logits of the adapter that PEFT made and saved, [B, S, V]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_base(family), config).eval()
        model.save_pretrained(str(folder))
    return logits_of(model)


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in peft_configs(family)]
)
def test_we_import_what_peft_saved(bases, tmp_path: Path, family: str, name: str):
    base = bases[family]
    torch.manual_seed(5)
    expected_BSV = save_with_peft(peft_configs(family)[name], family, tmp_path / "theirs")
    assert (expected_BSV - logits_of(base)).abs().max() > 1e-3

    sites = sites_of(base)
    found = import_peft(tmp_path / "theirs", sites, base_weight=lambda site: weight_of(base, site))

    assert found.layout == plan_layout(found.spec, resolve_targets(found.spec, sites))
    assert_same(summed_logits(base, found.layout, found.weights_P), expected_BSV)
    # And out again: stock PEFT agrees with itself.
    export_peft(
        tmp_path / "ours", found.spec, found.layout, found.weights_P, base_name="tiny", sites=sites
    )
    assert_same(logits_of(load_in_peft(tmp_path / "ours", family)), expected_BSV)


def test_a_copy_of_another_head_is_refused(bases, tmp_path: Path):
    base = bases["llama"]
    save_with_peft(peft_configs("llama")["head"], "llama", tmp_path)
    with pytest.raises(CheckpointMismatch, match="another lm_head weight"):
        import_peft(
            tmp_path,
            sites_of(base),
            base_weight=lambda site: weight_of(base, site) + np.float32(1e-3),
        )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_factors_are_written_in_the_adapters_dtype(bases, tmp_path: Path, dtype):
    base = bases["llama"]
    spec = AdapterSpec(rank=4, alpha=8, dtype=dtype)
    layout, weights_P = adapter(spec, base)
    export_peft(tmp_path / "a", spec, layout, weights_P, base_name="tiny", sites=sites_of(base))

    back = import_peft(tmp_path / "a", sites_of(base))

    rounded = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    rounded_P = torch.from_numpy(weights_P).to(rounded).float().numpy()
    assert back.spec.dtype == dtype
    assert np.array_equal(back.weights_P, rounded_P)
    assert_same(
        logits_of(load_in_peft(tmp_path / "a", "llama")), summed_logits(base, layout, rounded_P)
    )


@pytest.mark.parametrize(("family", "name"), MERGED)
def test_a_merged_model_is_an_ordinary_one(bases, tmp_path: Path, family: str, name: str):
    base, spec = bases[family], specs(family)[name]
    layout, weights_P = adapter(spec, base)
    base.save_pretrained(tmp_path / "base")

    export_merged(tmp_path / "merged", tmp_path / "base", layout, weights_P)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(logits_of(merged), summed_logits(base, layout, weights_P))
    has_head = any(factor.site == "lm_head" for factor in layout.factors)
    tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert tied == merged.config.tie_word_embeddings == (family in TIED and not has_head)


def test_the_merge_keeps_the_bases_dtype(bases, tmp_path: Path):
    base = bases["llama"]
    spec = AdapterSpec(rank=4, alpha=8)
    layout, weights_P = adapter(spec, base)
    rounded = tiny_base("llama")
    rounded.bfloat16()
    rounded.save_pretrained(tmp_path / "base")

    export_merged(tmp_path / "merged", tmp_path / "base", layout, weights_P)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert merged.dtype == torch.bfloat16
    # bf16 keeps 8 bits: logits of the size of 3 differ in the second digit after the point.
    torch.testing.assert_close(
        logits_of(merged).float(), summed_logits(base, layout, weights_P), atol=0.1, rtol=0
    )
