"""Pretrains `seedling` from nothing on the generated text.

`python examples/seedling/pretrain.py build/seedling` writes the model, its tokenizer and the
training curve into the folder; every few hundred steps it writes what it has so far.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from curve import write_csv, write_svg
from packing import IGNORED, batches
from tokenizer import train_tokenizer
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A freshly initialised model whose vocabulary is exactly the tokenizer's."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def optimizer_for(model: Qwen3ForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rate_at(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to one hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(
    model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor], *, bfloat16: bool
) -> torch.Tensor:
    """Mean next-token loss over the documents of a packed batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(
            input_ids=batch["ids"],
            position_ids=batch["positions"],
            attention_mask=batch["mask"],
            use_cache=False,
        ).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
    )


def save(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    points: list[tuple[int, int, float, float]],
) -> None:
    """Write everything the folder ships, model card aside."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_csv(out / "training_curve.csv", points)
    write_svg(out / "training_curve.svg", points)


def train(args: argparse.Namespace) -> None:
    """The whole run, from the tokenizer to the last weights."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocab_size, args.seed)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")
    optimizer = optimizer_for(model, args.rate)
    stream = batches(tokenizer, args.seed + 1, args.rows, args.row)
    points: list[tuple[int, int, float, float]] = []
    begin, tokens, recent = time.monotonic(), 0, []
    for step in range(args.steps):
        rate = rate_at(step, args.steps, args.rate, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(stream)
        loss = loss_of(model, batch, bfloat16=args.bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((batch["labels"] != IGNORED).sum())
        recent.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            points.append((step + 1, tokens, sum(recent) / len(recent), rate))
            recent = []
            spent = time.monotonic() - begin
            left = spent / (step + 1) * (args.steps - step - 1)
            print(
                f"step {step + 1}/{args.steps}  loss {points[-1][2]:.3f}  rate {rate:.2e}  "
                f"{tokens / spent:,.0f} tokens/s  {spent / 60:.1f} min, {left / 60:.1f} left",
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(model, tokenizer, args.out, points)


def main() -> None:
    """Read the settings and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch")
    parser.add_argument("--row", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--vocab-size", type=int, default=2816)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute in bfloat16 (weights stay float32)",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
