"""Bases whose names PEFT reads otherwise (experts, lists): what it loads is the adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import transformers_weight_conversion as theirs
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from manylora import Trainer, causal_datum
from manylora.checkpoint import export_peft, import_peft
from manylora.engine import Engine
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.models import naming
from manylora.types import AdapterSpec, ForwardBackward, ForwardBackwardResult, Opening, Unsupported
from tests.laws.tenants import perturb
from tests.models import tiny_config

EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
BASES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        **{"v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, **EXPERTS},
    },
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], **EXPERTS},
    "qwen2_moe": {},
}
# Its projections are leaves `0`, `1`, `2` of lists, as its layers are.
GEMMA3N: dict[str, Any] = {
    **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "laurel_rank": 8},
    **{"vocab_size_per_layer_input": 160, "intermediate_size": [96] * 3},
    "activation_sparsity_pattern": [0.5, 0.0, 0.0],
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
LAGUNA: dict[str, Any] = {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS}
TOKENS = [5, 9, 13, 40, 2, 7, 8, 30]
SPECS = {
    "all": AdapterSpec(rank=3, alpha=6, dropout=0.1),
    "dense": AdapterSpec(rank=2, alpha=5, targets=r".*layers\.0\..*down_proj"),
    "patterns": AdapterSpec(rank=2, rank_pattern={"down_proj": 4}, alpha_pattern={"up_proj": 7}),
}


# PEFT holds patterns against modules only before it says this, and against parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize(
    ("family", "name"),
    # Qwen2-MoE has no dense layer.
    [(f, n) for f in BASES for n in SPECS if (f, n) != ("qwen2_moe", "dense")],
)
def test_stock_peft_loads_the_adapter(tiny, tmp_path: Path, family: str, name: str):
    base, spec = tiny(family, **BASES[family]), SPECS[name]
    check_export(base, spec, tmp_path)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("targets", ["all-linear", r".*altup_projections\.1|.*q_proj"])
def test_layers_of_a_list_are_named_apart_from_its_layers(tiny, tmp_path: Path, targets: str):
    check_export(tiny("gemma3n_text", **GEMMA3N), AdapterSpec(rank=2, targets=targets), tmp_path)


def check_export(base: Path, spec: AdapterSpec, folder: Path) -> None:
    """Stock PEFT loads each factor where it was, and gives the same log-probabilities."""
    engine = Engine(Opening(str(base)))
    engine.create("a", spec)
    perturb(engine, "a")
    state = engine.state("a")
    export_peft(folder, spec, state.layout, state.weights, base_name=str(base), sites=engine.sites)

    stock = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(stock, folder).eval()
    parameters = dict(loaded.get_base_model().named_parameters())
    for factor in state.layout.factors:
        a_RK = parameters[f"{factor.site}.lora_A.default.weight"].detach().numpy()
        b_NR = parameters[f"{factor.site}.lora_B.default.weight"].detach().numpy()
        assert np.array_equal(a_RK, factor.a(state.weights)), factor.site
        assert np.array_equal(b_NR, factor.b_transposed(state.weights).T), factor.site
        module = loaded.get_base_model().get_submodule(factor.site)
        assert getattr(module, "scaling")["default"] == pytest.approx(factor.scale)  # noqa: B009
    assert sum("lora_A" in key for key in parameters) == len(state.layout.factors)
    work = ForwardBackward(
        adapter="a", data=[causal_datum(TOKENS, [1.0] * len(TOKENS))], backward=False
    )
    (ours,) = engine.forward_backward([work])
    assert isinstance(ours, ForwardBackwardResult)
    with torch.no_grad():
        logits_TV = loaded(torch.tensor([TOKENS])).logits[0, :-1]
    theirs = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(TOKENS[1:]), reduction="sum")
    assert ours.loss == pytest.approx(theirs.item(), rel=1e-3)

    back = import_peft(folder, engine.sites)
    assert np.array_equal(back.weights_P, state.weights)
    assert [f.site for f in back.layout.factors] == [f.site for f in state.layout.factors]
    assert back.spec.dropout == spec.dropout


def test_layers_that_peft_would_not_find_again_are_refused(tiny, tmp_path: Path):
    base = tiny("laguna", **LAGUNA)
    with Trainer(base, threads=1) as trainer:
        adapter = trainer.create("a", rank=2)
        with pytest.raises(Unsupported, match=r"layers\.1\.mlp\.shared_experts\.up_proj.*--merged"):
            adapter.export(tmp_path / "a").result()
        assert not (tmp_path / "a").exists()
        adapter.export(tmp_path / "merged", merged=True).result()
    check_export(base, AdapterSpec(rank=2, targets=("q_proj", "o_proj")), tmp_path / "b")


@pytest.mark.parametrize("family", ["laguna", "gemma3n_text", "gemma3", "llama4", "llava"])
def test_names_that_peft_loses_are_those_that_we_think(family: str):
    if family in ("laguna", "gemma3n_text"):
        config = tiny_config(family, **(LAGUNA if family == "laguna" else GEMMA3N))
    else:
        config = AutoConfig.for_model(family)
        config.get_text_config().num_hidden_layers = 2
        config.vision_config.num_hidden_layers = 2
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    found = theirs.convert_peft_adapter_state_dict_for_transformers(
        model, LoraConfig(), {key: torch.zeros(1, 1) for key in keys}
    )
    lost = {name for key, name in keys.items() if key not in found}
    assert naming.lost_names(model, names) == lost
    assert bool(lost) == (family == "laguna")


def test_the_renaming_of_old_checkpoints_is_peft_s():
    model: Any = torch.nn.Module()
    model._checkpoint_conversion_mapping = {"^visual": "model.visual"}
    model.config = None
    assert naming.lost_names(model, ["visual.up", "model.up"]) == {"visual.up"}


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


def test_a_layer_whose_name_is_the_end_of_anothers_is_written_as_a_pattern(tmp_path: Path):
    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(2, 2)
            self.inner = torch.nn.Sequential()
            self.inner.add_module("up", torch.nn.Sequential(torch.nn.Linear(2, 2)))

        def prepare_inputs_for_generation(self) -> None:
            """PEFT asks for its name."""

    base: Any = Base()
    base.config = None
    linears = {"up": base.up, "inner.up.0": base.inner.up[0]}
    found = naming.namings(base, list(linears.values()))
    assert found == {"up": "pattern", "inner.up.0": "leaf"}
    sites = [Site(name, 2, 2, n, naming=found[name]) for n, name in enumerate(linears)]
    spec = AdapterSpec(rank=1, alpha=2)
    layout = plan_layout(spec, resolve_targets(spec, sites))
    weights_P = np.arange(1, layout.num_params + 1, dtype=np.float32)
    export_peft(tmp_path, spec, layout, weights_P, base_name="base", sites=sites)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    parameters = dict(loaded.get_base_model().named_parameters())
    assert {n.partition(".lora_A")[0] for n in parameters if "lora_A" in n} == set(linears)
    for factor in layout.factors:
        a_RK = parameters[f"{factor.site}.lora_A.default.weight"].detach().numpy()
        assert np.array_equal(a_RK, factor.a(weights_P))
