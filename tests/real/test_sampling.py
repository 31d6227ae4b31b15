"""The real base speaks, and greedy answers are those of transformers' own `generate`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import manylora
from tests.real.plain_peft import encode
from tests.real.tenants import rows

pytestmark = pytest.mark.real

PROMPTS = ["What is the capital of France?", "Name three fruits.", "Write a line about the sea."]
TOKENS = 48


def asked(tokenizer: Any, prompt: str) -> list[int]:
    """A user's turn, ready for the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def generated(model: Any, tokens: list[int]) -> list[int]:
    """transformers' greedy answer."""
    with torch.no_grad():
        answer = model.generate(torch.tensor([tokens]), max_new_tokens=TOKENS, do_sample=False)
    return answer[0, len(tokens) :].tolist()


@pytest.fixture(scope="module")
def adapted(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An adapter after a few steps: its PEFT folder, its answers and the base's, all in one loop,
    and its merged model."""
    folder = tmp_path_factory.mktemp("adapted")
    with manylora.Trainer(real_base, threads=1) as trainer:
        prompts = [asked(trainer.tokenizer, prompt) for prompt in PROMPTS]
        adapter = trainer.create("tone", rank=8, alpha=16)
        data = []
        for row in rows("tone"):
            tokens, labels = encode(trainer.tokenizer, row)
            data.append(manylora.causal_datum(tokens, [float(label >= 0) for label in labels]))
        for _ in range(3):
            adapter.forward_backward(data)
            adapter.optim_step(lr=1e-3).result()
        params = manylora.SamplingParams(max_tokens=TOKENS)
        futures = adapter.sample(prompts, params), trainer.sample(prompts, params)
        mine, bare = (future.result().sequences for future in futures)
        adapter.export(folder / "peft").result()
        adapter.export(folder / "merged", merged=True).result()
    return {"folder": folder, "prompts": prompts, "adapter": mine, "base": bare}


def test_the_base_knows_a_capital(adapted: dict[str, Any], real_base: Path):
    tokenizer: Any = AutoTokenizer.from_pretrained(real_base)
    assert "Paris" in tokenizer.decode(adapted["base"][0].tokens)
    assert adapted["base"][0].stop_reason == "stop"


@pytest.mark.parametrize("who", ["base", "adapter"])
def test_greedy_answers_are_those_of_generate(adapted: dict[str, Any], real_base: Path, who: str):
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(real_base)
    if who == "adapter":
        model = PeftModel.from_pretrained(model, adapted["folder"] / "peft")
    model.eval()
    for tokens, answer in zip(adapted["prompts"], adapted[who], strict=True):
        assert list(answer.tokens) == generated(model, tokens)
        assert all(math.isfinite(logprob) for logprob in answer.logprobs)


def test_a_merged_model_answers_as_the_adapter_does(adapted: dict[str, Any]):
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(adapted["folder"] / "merged").eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for tokens, answer in zip(adapted["prompts"], adapted["adapter"], strict=True):
        given = list(answer.tokens)
        with torch.no_grad():
            logprobs_SV = model(torch.tensor([tokens + given])).logits[0].log_softmax(-1)
        begin = len(tokens) - 1
        theirs = [float(logprobs_SV[begin + i, token]) for i, token in enumerate(given)]
        assert theirs == pytest.approx(list(answer.logprobs), abs=2e-3)
