"""What a user of transformers, PEFT and torch alone would write: none of this is ours.

B sequences of a batch, S positions, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.real.tenants import CLIP, LR, Row

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_TRAINED = -100


def encode(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row and its labels: the answer and the token that ends it are trained."""
    if "messages" in row:
        asked = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, tokenize=False
        )
        answer = row["messages"][-1]["content"] + "<|im_end|>"
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        completion = tokenizer(answer, add_special_tokens=False)["input_ids"]
    else:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        completion = [*completion, tokenizer.eos_token_id]
    return prompt + completion, [NOT_TRAINED] * len(prompt) + completion


def batch(tokenizer: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """All rows, padded on the right."""
    pairs = [encode(tokenizer, row) for row in rows]
    longest = max(len(ids) for ids, _ in pairs)
    padded: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in pairs:
        gap = longest - len(ids)
        padded["input_ids"].append(ids + [0] * gap)
        padded["labels"].append(labels + [NOT_TRAINED] * gap)
        padded["attention_mask"].append([1] * len(ids) + [0] * gap)
    return {name: torch.tensor(lists) for name, lists in padded.items()}


class PlainPeft:
    """One adapter on the base, trained by a loop of a dozen lines."""

    def __init__(self, base: Path, settings: dict[str, Any], factors: dict[str, Tensor]):
        """`factors` are the first A of every layer by PEFT's names; B begins with zeros."""
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            target_modules=settings.get("targets", ALL_LINEAR),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            self.model = get_peft_model(model, config).eval()
        mine = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        assert {n.replace(".default", "") for n in mine} == set(factors)
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(factors[name.replace(".default", "")])
        self.optimizer = torch.optim.AdamW(mine.values(), lr=LR, weight_decay=0.0)

    def steps(self, rows: Sequence[Row], count: int) -> list[tuple[float, float]]:
        """Loss and gradient norm (before clipping) of every step over all rows."""
        inputs = batch(self.tokenizer, rows)
        done = []
        for _ in range(count):
            loss = self.model(**inputs).loss  # the mean over all trained tokens
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            done.append((float(loss.detach()), float(norm)))
        return done
