"""Bases with experts beside dense layers: what PEFT loads is the adapter; its rules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import transformers_weight_conversion as theirs
from transformers import AutoModelForCausalLM

from manylora.checkpoint import export_peft, import_peft
from manylora.engine import Engine
from manylora.models import naming
from manylora.types import AdapterSpec
from tests.laws.tenants import perturb

EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
BASES: dict[str, dict[str, Any]] = {
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], **EXPERTS},
    "qwen2_moe": {},
}
SPECS = {
    "all": AdapterSpec(rank=3, alpha=6, dropout=0.1),
    "dense": AdapterSpec(rank=2, alpha=5, targets=r".*layers\.0\..*down_proj"),
    "patterns": AdapterSpec(rank=2, rank_pattern={"down_proj": 4}, alpha_pattern={"up_proj": 7}),
}


# PEFT holds patterns against modules only before it says this, and against parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", BASES)
def test_stock_peft_loads_the_adapter(tiny, tmp_path: Path, family: str, name: str):
    base, spec = tiny(family, **BASES[family]), SPECS[name]
    if family == "qwen2_moe" and name == "dense":
        pytest.skip("it has no dense layer")
    engine = Engine(base)
    engine.create("a", spec)
    perturb(engine, "a")
    state = engine.state("a")
    export_peft(
        tmp_path, spec, state.layout, state.weights, base_name=str(base), sites=engine.sites
    )

    stock = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(stock, tmp_path)
    parameters = dict(loaded.get_base_model().named_parameters())
    for factor in state.layout.factors:
        a_RK = parameters[f"{factor.site}.lora_A.default.weight"].detach().numpy()
        b_NR = parameters[f"{factor.site}.lora_B.default.weight"].detach().numpy()
        assert np.array_equal(a_RK, factor.a(state.weights)), factor.site
        assert np.array_equal(b_NR, factor.b_transposed(state.weights).T), factor.site
        module = loaded.get_base_model().get_submodule(factor.site)
        assert getattr(module, "scaling")["default"] == pytest.approx(factor.scale)  # noqa: B009
    assert sum("lora_A" in key for key in parameters) == len(state.layout.factors)

    back = import_peft(tmp_path, engine.sites)
    assert np.array_equal(back.weights_P, state.weights)
    assert [f.site for f in back.layout.factors] == [f.site for f in state.layout.factors]


def test_what_peft_rewrites_is_what_we_think():
    families = theirs._MODEL_TO_CONVERSION_PATTERN
    assert families.keys() >= {"glm4_moe", "qwen3_moe", "deepseek_v3", "mixtral"}
    for family in [*families, "qwen2_moe", "llama", "gemma2"]:
        rule = theirs._MOE_TARGET_MODULE_MAPPING.get(families.get(family, ""), {})
        if theirs.get_checkpoint_conversion_mapping(family) is None:
            rule = {}
        assert set(naming.rewritten_targets(family)) == set(rule), family


def test_a_leaf_name_of_another_module_is_written_in_full():
    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])
            self.up = torch.nn.Linear(2, 2)

    base: Any = Base()
    base.config = None
    found = naming.namings(base, [base.layers[0][0], base.up])
    assert found == {"layers.0.0": "full", "up": "leaf"}
