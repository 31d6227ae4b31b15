"""The plan of a run, beside the base itself and the data themselves."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.config import load_run_file
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.models import open_base
from manylora.models.linears import find_linears
from manylora.runs.data_order import DataOrder
from manylora.runs.encode import Encoder
from manylora.runs.run_plan import plan_run
from manylora.runs.sources import read_source
from manylora.types import BaseModelError, DataError, TargetError

RUN = """\
base: ./base
out: runs/x
adapters:
  - name: a
    lora: {rank: 3, rank_pattern: {q_proj: 5}}
    sft: {train: d.jsonl, eval: d.jsonl, batch_size: 4, epochs: 2}
  - name: b
    lora: {rank: 2, targets: [v_proj, lm_head], dtype: bf16}
    sft: {train: d.jsonl, batch_size: 4, max_steps: 4}
    seed: 3
"""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_with(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "p" * n, "completion": "c"} for n in range(1, 11)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(RUN.replace("./base", str(base_folder)))

    def run_with(*overrides: str):
        return load_run_file("run.yaml", overrides)

    return run_with


def test_sizes_are_those_of_the_opened_base(run_with, base_folder):
    run = run_with()
    plan = plan_run(run)
    base = open_base(base_folder, dtype="fp32", device="cpu")
    sites = [
        Site(f.name, f.layer.in_features, f.layer.out_features, f.group, f.is_head)
        for f in find_linears(base)
    ]
    for entry, planned in zip(run.adapters, plan.adapters, strict=True):
        layout = plan_layout(entry.spec(), resolve_targets(entry.spec(), sites))
        assert planned.num_params == layout.num_params
        assert planned.num_targets == len(layout.factors)
    assert [p.rank for p in plan.adapters] == [(3, 5), (2, 2)]
    assert [p.num_bytes // p.num_params for p in plan.adapters] == [16, 18]
    assert plan.base_params == sum(p.numel() for p in base.model.parameters())
    assert (plan.context_length, plan.architecture) == (32, "LlamaForCausalLM")


def test_steps_and_tokens_are_those_of_the_data(run_with, tokenizer):
    run = run_with()
    data = Encoder(tokenizer).encode(read_source("d.jsonl")).data
    for entry, planned in zip(run.adapters, plan_run(run).adapters, strict=True):
        order = DataOrder(size=10, batch_size=4, seed=entry.seed)
        visited = [i for step in range(planned.steps) for i in order.batch_indices(step)]
        assert planned.num_tokens == sum(len(data[i]) for i in visited)
        assert planned.longest == max(map(len, data))
        assert planned.num_examples == 10
    assert [p.steps for p in plan_run(run).adapters] == [6, 4]
    assert [p.num_eval_examples for p in plan_run(run).adapters] == [10, 0]


def test_an_example_beyond_the_context_is_warned_of(run_with, tmp_path):
    assert plan_run(run_with()).warnings() == []
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "x" * 40}))
    (first, _) = plan_run(run_with()).warnings()
    assert "adapter a: its longest example has 40 tokens" in first and "ends at 32" in first


def test_what_would_stop_the_run_stops_the_plan(run_with):
    with pytest.raises(BaseModelError, match="nowhere"):
        plan_run(run_with("base=/nowhere"))
    with pytest.raises(TargetError, match="adapter b: target 'w_proj' matches no linear layer"):
        plan_run(run_with("adapters.b.lora.targets=[w_proj]"))
    with pytest.raises(DataError, match=r"adapter b: .*none.jsonl: there is no such file"):
        plan_run(run_with("adapters.b.sft.train=none.jsonl"))


def test_the_plan_is_plain_data(run_with):
    plan = plan_run(run_with()).to_json()
    assert json.loads(json.dumps(plan))["adapters"][0]["name"] == "a"
