"""Pretrains `seedling` from nothing on the generated text.

`python examples/seedling/pretrain.py build/seedling` writes the model, its tokenizer and the
training curve into the folder; every few hundred steps it writes what it has so far.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from curve import read_csv, write_csv, write_svg
from generate import MIXTURES
from packing import IGNORED, batches
from tokenizer import save_tokenizer, train_tokenizer
from torch import distributed, multiprocessing
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


def summed_loss(
    model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor], *, bfloat16: bool
) -> torch.Tensor:
    """Next-token loss summed over the documents of a packed batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(
            input_ids=batch["ids"],
            position_ids=batch["positions"],
            attention_mask=batch["mask"],
            use_cache=False,
        ).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1),
        batch["labels"].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def join(worker: int, workers: int, meeting: str) -> None:
    """Let the workers find each other; they meet in a file and talk on this machine only."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=worker, world_size=workers
    )


def share(model: Qwen3ForCausalLM, loss: torch.Tensor) -> float:
    """Add up gradients and loss over all workers; returns the whole loss."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([loss.detach().reshape(1), *(g.flatten() for g in gradients)])
    distributed.all_reduce(flat)
    at = 1
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    return float(flat[0])


def save(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    points: list[tuple[int, int, float, float]],
) -> None:
    """Write everything the folder ships, model card aside."""
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    write_csv(out / "training_curve.csv", points)
    write_svg(out / "training_curve.svg", points)


def train(worker: int, args: argparse.Namespace, meeting: str) -> None:
    """The whole run, from the tokenizer to the last weights; each worker takes part of a batch."""
    if args.workers > 1:
        join(worker, args.workers, meeting)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocab_size, args.seed)
    model, points = new_model(tokenizer), []
    if args.start_from:
        model = Qwen3ForCausalLM.from_pretrained(args.start_from, dtype=torch.float32)
        points = read_csv(args.start_from / "training_curve.csv")
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")
    optimizer = optimizer_for(model, args.rate)
    stream = batches(tokenizer, args.data_seed, args.rows, args.row, args.mixture)
    before, tokens_before = points[-1][:2] if points else (0, 0)
    begin, tokens, recent = time.monotonic(), 0, []
    last = args.stop_after or args.steps
    for step in range(last):
        rate = rate_at(step, args.steps, args.rate, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(stream)
        count = int((batch["labels"] != IGNORED).sum())
        part = {name: tensor[worker :: args.workers] for name, tensor in batch.items()}
        loss = summed_loss(model, part, bfloat16=args.bfloat16) / count
        loss.backward()
        recent.append(share(model, loss) if args.workers > 1 else loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += count
        if worker > 0:
            continue
        if (step + 1) % 20 == 0 or step + 1 == last:
            points.append(
                (before + step + 1, tokens_before + tokens, sum(recent) / len(recent), rate)
            )
            recent = []
            spent = time.monotonic() - begin
            left = spent / (step + 1) * (last - step - 1)
            print(
                f"step {step + 1}/{args.steps}  loss {points[-1][2]:.3f}  rate {rate:.2e}  "
                f"{tokens / spent:,.0f} tokens/s  {spent / 60:.1f} min, {left / 60:.1f} left",
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == last:
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
    parser.add_argument("--stop-after", type=int, help="stop early, the schedule unchanged")
    parser.add_argument("--start-from", type=Path, help="folder of an earlier phase to go on from")
    parser.add_argument("--vocab-size", type=int, default=2816)
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokenizer")
    parser.add_argument("--mixture", choices=MIXTURES, default="skills", help="of the text")
    parser.add_argument("--data-seed", type=int, default=1, help="of the text; one for each phase")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--workers", type=int, default=2, help="processes that share a batch")
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute in bfloat16 (weights stay float32)",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.workers == 1:
        train(0, args, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        # Whoever ends this process wants the workers ended too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        multiprocessing.spawn(train, args=(args, meeting), nprocs=args.workers, daemon=True)


if __name__ == "__main__":
    main()
