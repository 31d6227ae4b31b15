"""Commands on a real base: what is sampled and written is what the Python API gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.api import Trainer
from manylora.cli import main as cli
from manylora.types import AdapterSpec, SamplingParams, causal_datum
from tests.unit.runs.small_tokenizer import make_tokenizer

PROMPT = "reverse the word"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small base, and an adapter's folder as a run leaves it."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    tokens = tokenizer(PROMPT + " cba cba cba")["input_ids"]
    with Trainer(root / "base", threads=1) as trainer:
        adapter = trainer.create("a", AdapterSpec(rank=4))
        for step in range(1, 4):
            adapter.forward_backward([causal_datum(tokens, [1.0] * len(tokens))])
            adapter.optim_step(lr=0.05)
            adapter.save(root / "a" / "checkpoints" / f"step-{step}", {"step": step}).result()
        adapter.export(root / "a" / "final").result()
        prompt = [tokenizer(PROMPT)["input_ids"]]
        answers = {
            name: tokenizer.decode(
                list(
                    owner.sample(prompt, SamplingParams(max_tokens=8)).result().sequences[0].tokens
                ),
                skip_special_tokens=True,
            )
            for name, owner in (("adapter", adapter), ("base", trainer))
        }
    (root / "answers.json").write_text(json.dumps(answers))
    assert answers["adapter"] != answers["base"]  # or nothing below could fail
    return root


def manylora(capsys, *arguments: str) -> str:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def sampled(capsys, *arguments: str) -> dict[str, str]:
    out = manylora(capsys, "sample", *arguments, "--prompt", PROMPT, "--max-tokens", "8", "--json")
    return {row["adapter"]: row["answer"] for row in map(json.loads, out.splitlines())}


def test_finished_adapters_states_and_bases_answer_as_they_did(capsys, run):
    answers = json.loads((run / "answers.json").read_text())
    found = sampled(
        capsys,
        *("--adapter", str(run / "a")),
        *("--adapter", str(run / "a/checkpoints/step-3")),
        *("--adapter", str(run / "a/checkpoints/step-1")),
    )
    assert found["a"] == found["a@3"] == answers["adapter"]
    assert len(found) == 3
    bare = sampled(capsys, "--base", str(run / "base"))
    assert bare == {str(run / "base"): answers["base"]}


def test_a_state_exported_is_the_adapter_that_was_exported(capsys, run, tmp_path):
    source, target = str(run / "a/checkpoints/step-3"), tmp_path / "out"
    assert manylora(capsys, "export", source, str(target)) == f"{target}\n"
    written, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (target, run / "a/final")
    )
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_a_merged_model_is_a_base_that_answers_so(capsys, run, tmp_path):
    answers = json.loads((run / "answers.json").read_text())
    manylora(capsys, "export", str(run / "a"), str(tmp_path / "merged"), "--merged")
    (answer,) = sampled(capsys, "--base", str(tmp_path / "merged")).values()
    assert answer == answers["adapter"]


def test_inspect_verifies(capsys, run):
    final = json.loads(manylora(capsys, "inspect", str(run / "a"), "--json"))
    assert (final["kind"], final["verified"], final["rank"]) == ("peft-adapter", True, 4)
    assert "step: 2" in manylora(capsys, "inspect", str(run / "a/checkpoints/step-2"))
