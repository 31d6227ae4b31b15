"""Checks that every quickstart task is near 0 % for the base and learnt by its adapter.

Trains each task's adapter alone with PEFT and compares greedy answers on held-out words with
the right ones, exactly. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from manylora.quickstart.tasks import TASKS, Task, TaskExample, examples

SHIPPED = Path(__file__).parents[2] / "src" / "manylora" / "models" / "seedling"
IGNORED = -100
WARMUP = 10


def encode(tokenizer: PreTrainedTokenizerBase, item: TaskExample) -> tuple[list[int], list[int]]:
    """Prompt ids, and completion ids with the end-of-text token."""
    prompt = tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]
    completion = tokenizer(item["completion"], add_special_tokens=False)["input_ids"]
    return prompt, [*completion, tokenizer.eos_token_id]


def collate(items: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels already shifted; causal attention needs no mask for these."""
    width = max(len(prompt) + len(completion) for prompt, completion in items) - 1
    ids = torch.zeros(len(items), width, dtype=torch.long)
    labels = torch.full((len(items), width), IGNORED)
    for row, (prompt, completion) in enumerate(items):
        whole = prompt + completion
        ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        labels[row, len(prompt) - 1 : len(whole) - 1] = torch.tensor(completion)
    return ids, labels


@torch.no_grad()
def exact_share(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: list[TaskExample],
    wrong: list[str] | None = None,
) -> float:
    """Share of items whose text up to the end of text is exactly right, by greedy choice."""
    model.eval()
    right = 0
    end = tokenizer.eos_token
    by_length: dict[int, list[TaskExample]] = {}
    for item in items:
        by_length.setdefault(len(encode(tokenizer, item)[0]), []).append(item)
    for group in by_length.values():
        pairs = [encode(tokenizer, item) for item in group]
        ids = torch.tensor([prompt for prompt, _ in pairs])
        answers = torch.zeros(len(pairs), 0, dtype=torch.long)
        past = None
        # The same text can take a few tokens more when it is cut up in another way.
        for _ in range(max(len(completion) for _, completion in pairs) + 4):
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            ids = out.logits[:, -1:].argmax(-1)
            answers = torch.cat([answers, ids], dim=1)
        for item, answer in zip(group, answers.tolist(), strict=True):
            text, ended, _ = tokenizer.decode(answer).partition(end)
            same = text == item["completion"] and bool(ended)
            right += same
            if not same and wrong is not None:
                wrong.append(item["prompt"] + text)
    return right / len(items)


def train_adapter(
    task: Task, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int
) -> int:
    """Train the adapter on `model` in place; returns how many tokens went through it."""
    rng = Random(seed)
    items = [encode(tokenizer, item) for item in examples(task, "train", seed)]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.0)
    left: list[tuple[list[int], list[int]]] = []
    tokens = 0
    model.train()
    for step in range(task.steps):
        if len(left) < task.batch_size:
            left = rng.sample(items, len(items))
        batch, left = left[: task.batch_size], left[task.batch_size :]
        done = max(0.0, (step - WARMUP) / (task.steps - WARMUP))
        scale = (step + 1) / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * scale
        ids, labels = collate(batch)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(prompt) + len(completion) for prompt, completion in batch)
    return tokens


def check(task: Task, model_dir: Path, seed: int, show: int) -> tuple[float, float, int, float]:
    """Base share, adapter share, tokens trained on and seconds for one task and one seed."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    held_out = examples(task, "held_out", seed)
    base = exact_share(model, tokenizer, held_out)
    targets = task.targets if isinstance(task.targets, str) else list(task.targets)
    config = LoraConfig(
        r=task.rank,
        lora_alpha=task.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    begin = time.monotonic()
    tokens = train_adapter(task, adapted, tokenizer, seed)
    spent = time.monotonic() - begin
    wrong: list[str] = []
    share = exact_share(adapted, tokenizer, held_out, wrong)
    for line in wrong[:show]:
        print("    wrong:", line)
    return base, share, tokens, spent


def main() -> None:
    """Check the chosen tasks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--tasks", nargs="*", help="names; all if left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show-wrong", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| task | rank | steps | tokens a step | base | adapter, seed by seed |")
    print("|---|---|---|---|---|---|")
    seconds = 0.0
    for task in TASKS:
        if args.tasks and task.name not in args.tasks:
            continue
        runs = [check(task, args.model, seed, args.show_wrong) for seed in range(args.seeds)]
        seconds += sum(run[3] for run in runs) / len(runs)
        base = ", ".join(f"{run[0]:.1%}" for run in runs)
        after = ", ".join(f"{run[1]:.1%}" for run in runs)
        per_step = runs[0][2] / task.steps
        print(
            f"| {task.name} | {task.rank} | {task.steps} | {per_step:.0f} | {base} | {after} |",
            flush=True,
        )
    print(f"\nTraining one adapter after another took {seconds:.0f} s.")


if __name__ == "__main__":
    main()
