"""Which layers a spec names: what real PEFT makes of the same words, and helpful refusals."""

import pytest

from manylora.engine import Engine
from manylora.lora.sites import Site, resolve_targets
from manylora.types import AdapterSpec, ConfigError, Opening, TargetError
from tests.laws.stock_peft import peft_config, wrapped
from tests.models import tiny_model

SPECS = {
    "all": AdapterSpec(rank=2),
    "one leaf": AdapterSpec(rank=2, targets=("q_proj",)),
    "leaves": AdapterSpec(rank=2, targets=("q_proj", "down_proj")),
    "a longer end": AdapterSpec(rank=2, targets=("self_attn.o_proj", "1.mlp.up_proj")),
    "a whole name": AdapterSpec(rank=2, targets=("model.layers.2.mlp.gate_proj",)),
    "head": AdapterSpec(rank=2, targets=("lm_head", "v_proj")),
    "regex": AdapterSpec(rank=2, targets=r".*\.(q|k)_proj"),
    "regex with layers": AdapterSpec(rank=2, targets=r"model\.layers\.[02]\..*_proj"),
    "regex with head": AdapterSpec(rank=2, targets=r".*up_proj|lm_head"),
    "regex of everything": AdapterSpec(rank=2, targets=r".*proj"),
    "rank by leaf": AdapterSpec(rank=2, rank_pattern={"q_proj": 5, "mlp.up_proj": 3}),
    "rank by layer": AdapterSpec(rank=2, rank_pattern={r"layers\.1\..*": 7}),
    "first pattern wins": AdapterSpec(rank=2, rank_pattern={r".*\.q_proj": 3, r"layers\.0\..*": 4}),
    "anchored": AdapterSpec(rank=2, rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 6}),
    "alpha": AdapterSpec(rank=2, alpha=3, alpha_pattern={"q_proj": 9, r"layers\.2\..*": 5}),
    "both": AdapterSpec(rank=4, alpha=3, rank_pattern={"q_proj": 9}, alpha_pattern={"k_proj": 5}),
    "rslora": AdapterSpec(rank=4, alpha=3, use_rslora=True, rank_pattern={"q_proj": 9}),
}


@pytest.fixture(scope="module")
def sites(tiny) -> tuple[Site, ...]:
    return Engine(Opening(str(tiny("llama")))).sites


@pytest.mark.parametrize("name", SPECS)
def test_the_layers_ranks_and_scales_are_pefts(sites, name: str):
    spec = SPECS[name]
    model = wrapped(tiny_model("llama"), peft_config(spec)).get_base_model()
    theirs = {
        path: (module.r["default"], pytest.approx(module.scaling["default"]))
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    ours = {
        t.site.name: (t.rank, spec.scale(t.rank, t.alpha)) for t in resolve_targets(spec, sites)
    }
    assert ours == theirs


def test_targets_keep_the_order_of_the_sites(sites):
    spec = AdapterSpec(targets=("down_proj", "q_proj"))
    names = [t.site.name for t in resolve_targets(spec, sites)]
    assert names == [s.name for s in sites if s.leaf in ("down_proj", "q_proj")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ("q_proj", "query")}, ["'query'", "q_proj (3)", "lm_head (1)", "full names"]),
        ({"targets": ("proj",)}, ["'proj'", "down_proj (3)"]),
        ({"targets": "q_proj"}, ["'q_proj'", "q_proj (3)"]),  # a string is a whole-name regex
        ({"targets": "(q_proj"}, ["targets", "is not a regular expression"]),
        ({"rank_pattern": {"query": 3}}, ["rank_pattern 'query'", "q_proj (3)"]),
        (
            {"targets": ("q_proj",), "rank_pattern": {"k_proj": 3}},
            ["'k_proj'", "there are: q_proj (3);"],
        ),
        ({"alpha_pattern": {"[": 3.0}}, ["alpha_pattern", "is not a regular expression"]),
    ],
)
def test_what_matches_nothing_is_refused_with_candidates(sites, settings: dict, words: list[str]):
    with pytest.raises(TargetError) as caught:
        resolve_targets(AdapterSpec(rank=2, **settings), sites)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": r"((.|\w)*)*[0-9]"},
        {"rank_pattern": {r"((.|\w)*)*[0-9]": 3}},
        {"alpha_pattern": {r"(?:(?:a{1000}){1000}){1000}": 3.0}},
    ],
)
def test_a_pattern_is_matched_within_bounds(settings: dict):
    (name,) = settings
    sites = [Site(f"model.layers.{n}.self_attn." + "q" * 40, 8, 8, n) for n in range(30)]
    with pytest.raises(TargetError, match=f"{name}: .*(too long|longer than)"):
        resolve_targets(AdapterSpec(**settings), sites)
