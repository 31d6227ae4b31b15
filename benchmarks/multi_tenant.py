"""Many adapters at once against the bare base and against PEFT one after another.

    python -m benchmarks.multi_tenant [--rounds 15] [--models toy,seedling] [--tokens 32,128,512]
                                      [--ranks 4,4,8,8,8,16,16,32] [--out FILE.json]

For each model and number of tokens per tenant, in one run with the arms interleaved, medians of
thread CPU time on one thread:

    overhead    fused step / the same packed step without adapters
    speed-up    Σ sequential PEFT steps / fused step
      batching  of it: the bare base one tenant at a time / all in one batch
      overhead  of it: the rest (PEFT's overhead against ours)

and, counted rather than timed, the memory of the loss and the bytes an adapter holds.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.arms import RANKS, Fused, Load, arms, make_load
from benchmarks.memory import loss_memory

TARGETS = {32: (1.45, 2.2), 128: (1.20, 1.4), 512: (1.08, 1.05)}


def toy_llama(folder: Path) -> Path:
    """Hidden 256, MLP 688, 4 layers, vocabulary 8192, random weights from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=8192, max_position_embeddings=1024,
        tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def interleaved(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Thread CPU seconds of every arm in every round, after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 2):
        for name, arm in arms.items():
            began = time.thread_time()
            arm()
            if number >= 2:
                times[name].append(time.thread_time() - began)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of the rounds' ratios."""
    ratios = sorted(a / b for a, b in zip(times[over], times[under], strict=True))
    return statistics.median(ratios), ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]


def measure(name: str, load: Load, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    times = interleaved(arms(load), rounds)
    speedup, batching = ratio(times, "peft", "fused"), ratio(times, "bare_sequential", "bare")
    return {
        "model": name,
        "tokens_per_tenant": load.tokens,
        "overhead_step": ratio(times, "fused", "bare"),
        "overhead_forward_backward": ratio(times, "fused_fb", "bare"),
        "speedup": speedup,
        "of_it_batching": batching,
        "of_it_overhead": speedup[0] / batching[0],
        "milliseconds": {arm: statistics.median(t) * 1e3 for arm, t in times.items()},
    }


def bytes_per_parameter(base: Path | str, vocab: int) -> float:
    """What an fp32 adapter holds after its first step."""
    fused = Fused(make_load(base, vocab, 32))
    fused.step()
    adapters = fused.engine.adapters.values()
    return sum(a.num_bytes() for a in adapters) / sum(a.layout.num_params for a in adapters)


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row with its targets."""
    overhead, speedup = row["overhead_step"], row["speedup"]
    most, least = TARGETS[row["tokens_per_tenant"]]
    print(
        f"{row['model']:9} {row['tokens_per_tenant']:4}  "
        f"{overhead[0]:5.2f} ({overhead[1]:.2f}–{overhead[2]:.2f}, ≤ {most})  "
        f"{row['overhead_forward_backward'][0]:5.2f}   "
        f"{speedup[0]:5.2f} ({speedup[1]:.2f}–{speedup[2]:.2f}, ≥ {least})  "
        f"{row['of_it_batching'][0]:5.2f}  {row['of_it_overhead']:5.2f}   "
        + "  ".join(f"{arm} {ms:.0f}" for arm, ms in row["milliseconds"].items()),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", default="toy,seedling")
    parser.add_argument("--tokens", default="32,128,512")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    report: dict[str, Any] = {"machine": machine(), "ranks": ranks, "rows": [], "memory": {}}
    print(json.dumps(report["machine"]))
    print(
        "model   tok/tenant  overhead (10–90 %, goal)  fwd+bwd  speed-up (10–90 %, goal)  "
        "batching × overhead   ms"
    )
    with tempfile.TemporaryDirectory() as scratch:
        bases: dict[str, Path | str] = {"toy": toy_llama(Path(scratch)), "seedling": "seedling"}
        for name in options.models.split(","):
            for tokens in map(int, options.tokens.split(",")):
                load = make_load(bases[name], 2000, tokens, ranks)
                row = measure(name, load, options.rounds)
                report["rows"].append(row)
                show(row)
            memory = {"bytes_per_parameter": bytes_per_parameter(bases[name], 2000)}
            memory |= loss_memory(bases[name])
            report["memory"][name] = memory
            print(f"{name}: {memory}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
