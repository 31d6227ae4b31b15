"""Bytes that ranks hold and send are those of the formulas that docs/scale.md is made with."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import mesh as benchmark
from benchmarks.mesh_formulas import Base
from benchmarks.mesh_plan import MODELS, Case, cases, plan, plan_quantized
from manylora.types.mesh_shape import MeshShape
from manylora.types.weight_forms import Quantization
from tests.models import TinyBases

REPO = Path(__file__).resolve().parents[2]
COUNTS = (0, 4)


@pytest.fixture(scope="module")
def rows(tiny: TinyBases) -> list[dict[str, Any]]:
    base = benchmark.base_of(None)
    return list(benchmark.measure("dp=2,tp=2", benchmark.folder_of(tiny, base), base, COUNTS))


def test_counts_are_those_of_the_formulas(rows: list[dict[str, Any]]):
    assert len(rows) == 4 * 2 * len(COUNTS)
    assert [one for row in rows for one in benchmark.differences(row)] == []


def test_counts_on_a_quantised_base_are_those_of_the_formulas(tiny: TinyBases):
    base = benchmark.base_of("nf4")
    folder = benchmark.folder_of(tiny, base)
    rows = list(benchmark.measure("dp=2,tp=2", folder, base, COUNTS, "nf4"))
    assert [one for row in rows for one in benchmark.differences(row)] == []
    assert benchmark.same_with_adapters(rows) == []
    row = rows[0]
    row["formula"] = benchmark.formula(
        benchmark.base_of("int8"), row["mesh"], row["rank"], 0, checkpointing=False
    )
    wrong = " ".join(benchmark.differences(row))
    assert "base is" in wrong and "gathered is" in wrong and "forward_backward is" in wrong


def test_adapters_add_nothing_to_what_forward_backward_sends(rows: list[dict[str, Any]]):
    assert benchmark.same_with_adapters(rows) == []


def test_activations_are_those_of_the_formula(tiny: TinyBases):
    rows = list(benchmark.peaks(tiny, [("dp=1", "bf16")]))
    assert [one for row in rows for one in benchmark.peak_differences(row)] == []
    rows[0]["bytes_per_token"] *= 1.03
    assert len(benchmark.peak_differences(rows[0])) == 1


def test_differences_are_noticed(rows: list[dict[str, Any]]):
    for name in ("base", "gathered", "forward_backward_wire", "optim_step_peak"):
        wrong = copy.deepcopy(rows[1])
        wrong["measured"][name] += 1_000_000
        assert len(benchmark.differences(wrong)) == 1, name
    wrong = copy.deepcopy(rows[1])
    wrong["measured"]["held"]["moments"] += 4
    wrong["measured"]["optim_step"]["world.sum"][0] += 1
    assert len(benchmark.differences(wrong)) == 2
    wrong = copy.deepcopy(rows)
    wrong[1]["measured"]["forward_backward"]["tp.sum"][0] += 1
    assert len(benchmark.same_with_adapters(wrong)) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_formulas_know_the_parameters_of_a_base(family: str):
    moe = family == "qwen3_moe"
    base = Base(64, 3, 8, 4, 16, 32, 160, experts=6 * moe, active=2 * moe, head_norms=moe)
    more = {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2} if moe else {}
    config = AutoConfig.for_model(
        family, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        head_dim=16, intermediate_size=32, vocab_size=160, tie_word_embeddings=False, **more,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert base.parameters() == sum(p.numel() for p in model.parameters())


def test_large_bases_have_the_parameters_that_their_makers_publish():
    assert {model.name: model.base.parameters() for model in MODELS} == {
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.3-70B": 70_553_706_496,
        "Qwen3-235B-A22B": 235_093_634_560,
    }


def test_the_page_shows_what_the_formulas_give():
    text = (REPO / "docs/scale.md").read_text(encoding="utf-8")
    assert plan() in text
    assert plan_quantized("nf4") in text


def test_a_plan_is_sane():
    chosen = list(cases())
    assert {case.mesh.size for case in chosen} == {8, 64}
    for case in chosen:
        assert case.base.heads % case.mesh.tp == case.base.kv_heads % case.mesh.tp == 0
        more = replace(case, tokens=2 * case.tokens)
        assert more.activations() == 2 * case.activations()
        assert more.covering() == case.covering()
    # Eight times the ranks hold an eighth each.
    dense = MODELS[0]
    few, many = (Case(dense, MeshShape.parse(mesh)) for mesh in ("dp=8", "dp=64"))
    assert many.left(80e9) > few.left(80e9) and many.held(16) < few.held(16)


@pytest.mark.parametrize(
    ("record", "kind"), [("2026-11-20_mesh_gloo", None), ("2026-11-21_mesh_gloo_nf4", "nf4")]
)
def test_the_results_on_record_are_of_this_benchmark_and_these_formulas(
    record: str, kind: Quantization | None
):
    page = REPO / f"benchmarks/results/{record}.md"
    base = benchmark.base_of(kind)
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    rows = found["rows"]
    assert {row["mesh"] for row in rows} == {str(MeshShape.parse(m)) for m in benchmark.MESHES}
    for row in rows:
        row["formula"] = benchmark.formula(
            base, row["mesh"], row["rank"], row["adapters"], checkpointing=row["checkpointing"]
        )
        assert benchmark.differences(row) == []
    text = page.read_text(encoding="utf-8")
    # All but the machine.
    about = benchmark.introduction(base, "MACHINE", kind)
    before, after = benchmark.report(rows, found["activations"], about).split("MACHINE")
    assert text.startswith(before) and text.endswith(after + "\n")
