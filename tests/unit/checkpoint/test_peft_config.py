"""PEFT's config: understood as PEFT does, or refused by name."""

import random
from dataclasses import fields

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manylora.checkpoint import JSON
from manylora.checkpoint.peft_config import exact_pattern, exact_targets, parse_config
from manylora.lora.sites import Site, resolve_targets
from manylora.types import AdapterSpec, CheckpointDamaged, Unsupported
from tests.unit.checkpoint.states import SITES

PLAIN: dict[str, JSON] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "lora_dropout": 0.0,
}


def site(name: str) -> Site:
    return Site(name, 8, 8, 0)


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.11.self_attn.q_proj",
    "tower.blocks.1.self_attn.q_proj",
    "tower.model.layers.0.self_attn.q_proj",  # ends in the full name of another one
    "self_attn.q_proj",
    "lm_head",
]

CONFIGS: list[dict[str, JSON]] = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": ["proj", "_proj"]},
    {"target_modules": r".*\.1\..*(q|k)_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": r".*_proj", "exclude_modules": r"model.*k_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers", "no"]},
    {"target_modules": ["self_attn.q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_targets_mean_what_they_mean_to_peft(config):
    ours = parse_config({**PLAIN, **config}, "c.json")
    theirs = LoraConfig(**config)
    for name in NAMES:
        expected = bool(check_target_module_exists(theirs, name))
        assert ours.adapts(site(name)) == expected, name


def test_all_linear_leaves_the_head_out():
    config = parse_config({**PLAIN, "target_modules": "All-Linear"}, "c.json")
    assert [config.adapts(s) for s in SITES] == [not s.is_head for s in SITES]


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2, r"layers\.0\..*q_proj": 3},
        {r"layers\.0\..*q_proj": 3, "q_proj": 2},
        {"^model.layers.1.self_attn.q_proj": 2},
        {"proj": 2, "1.self_attn.k_proj": 3},
        {"q_proj|k_proj": 5, "lm_head": 9},
    ],
)
def test_patterns_mean_what_they_mean_to_peft(pattern):
    ours = parse_config({**PLAIN, "rank_pattern": pattern, "alpha_pattern": pattern}, "c.json")
    for name in NAMES:
        key = get_pattern_key(pattern.keys(), name)
        assert ours.rank_of(name) == pattern.get(key, 4), name
        assert ours.alpha_of(name) == pattern.get(key, 8), name


# --- refusals ---------------------------------------------------------------------------------

REFUSED: dict[str, JSON] = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "peft_type": "LOHA",
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 4], [2, 5]],
    "use_qalora": True,
    "alora_invocation_tokens": [5, 6],
    "monteclora_config": {"num_samples": 8},
    "kasa_config": {"a": 1},
    "velora_config": {"a": 1},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"a": 1},
    "lora_ga_config": {"direction": "ArB2r"},
    "megatron_config": {"tp": 2},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa_niter_16",
    "a_field_of_the_future": 1,
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(field: str):
    with pytest.raises(Unsupported, match=rf"c\.json.*{field}"):
        parse_config({**PLAIN, field: REFUSED[field]}, "c.json")


def test_every_refused_field_is_named_at_once():
    with pytest.raises(Unsupported) as raised:
        parse_config({**PLAIN, **REFUSED}, "c.json")
    assert [field for field in REFUSED if field not in str(raised.value)] == []


def test_every_field_of_pefts_config_is_known_or_refused():
    """A new release of PEFT may add fields: set to anything, they must not pass unread."""
    read = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
    read |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    # These say where an adapter came from, or matter only beside a field that is refused.
    read |= {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    read |= {"inference_mode", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"}
    for field in fields(LoraConfig):
        if field.name not in read:
            with pytest.raises(Unsupported, match=field.name):
                parse_config({**PLAIN, field.name: "set to something"}, "c.json")


def test_pefts_own_defaults_pass():
    config = LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    parsed = parse_config({**config, "peft_type": "LORA", "target_modules": ["q_proj"]}, "c.json")
    assert (parsed.rank, parsed.alpha, parsed.use_rslora, parsed.base_name) == (4, 8, False, None)
    for init in ("gaussian", "eva", "orthogonal", False):
        parse_config({**PLAIN, "init_lora_weights": init}, "c.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("r", None),
        ("lora_alpha", "x"),
        ("lora_alpha", None),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 1.5}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"(": 2}),
        ("target_modules", "("),
        ("target_modules", [1]),
        ("target_modules", 5),
        ("exclude_modules", "["),
        ("layers_to_transform", ["1"]),
        ("layers_pattern", 3),
    ],
)
def test_a_wrong_value_is_named(field: str, value):
    with pytest.raises(CheckpointDamaged, match=rf"c\.json: {field}"):
        parse_config({**PLAIN, field: value}, "c.json")


# --- exact names ------------------------------------------------------------------------------


def test_exact_targets_name_a_leaf_only_where_all_of_it_is_meant():
    sites = [site(name) for name in NAMES if not name.startswith("tower.model")]
    q_proj = {s.name for s in sites if s.leaf == "q_proj"}
    assert exact_targets(q_proj, sites) == ("q_proj",)
    assert exact_targets({NAMES[0], "lm_head"}, sites) == ("lm_head", NAMES[0])


def test_exact_targets_tell_endings_apart():
    sites = [site(name) for name in NAMES]
    # `self_attn.q_proj` is the whole name of one and the ending of others.
    assert exact_targets({"self_attn.q_proj"}, sites) == r"self_attn\.q_proj"
    assert exact_targets({NAMES[0]}, sites) == r"model\.layers\.0\.self_attn\.q_proj"
    assert exact_targets({NAMES[0], NAMES[7]}, sites) == (NAMES[0], NAMES[7])


def test_exact_targets_match_any_choice_exactly():
    """PEFT's own matcher and ours agree on 300 random choices, and on no other module."""
    chance = random.Random(0)
    sites = [site(name) for name in NAMES]
    for _ in range(300):
        chosen = {name for name in NAMES if chance.random() < 0.5} or {NAMES[0]}
        targets = exact_targets(chosen, sites)
        theirs = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
        assert {name for name in NAMES if check_target_module_exists(theirs, name)} == chosen
        ours = resolve_targets(AdapterSpec(targets=targets), sites)
        assert {target.site.name for target in ours} == chosen


def test_exact_patterns_give_every_value_back():
    chance = random.Random(0)
    for _ in range(300):
        values = {name: chance.choice([2, 3, 3, 8]) for name in NAMES}
        default, pattern = exact_pattern(values)
        for name, value in values.items():
            assert pattern.get(get_pattern_key([*pattern], name), default) == value
        ours = resolve_targets(
            AdapterSpec(rank=default, rank_pattern=pattern, targets=".*"),
            [site(name) for name in NAMES],
        )
        assert {target.site.name: target.rank for target in ours} == values


def test_exact_patterns_are_short():
    values = {s.name: 5 if s.leaf == "o_proj" else 3 for s in SITES}
    assert exact_pattern(values) == (3, {"o_proj": 5})
