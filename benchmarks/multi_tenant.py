"""This benchmark compares many adapters at once with the bare base and with sequential PEFT.

    python -m benchmarks.multi_tenant [--rounds 15] [--models toy,seedling] [--tokens 32,128,512]
                                      [--ranks 4,4,8,8,8,16,16,32] [--out FILE.json]
    python -m benchmarks.multi_tenant --base FOLDER [--out FILE.json]      (under ten minutes)

For each model and number of tokens per tenant it prints, of one run with the arms interleaved,
medians of thread CPU time on one thread:

    overhead    fused step / the same packed step without adapters
    speed-up    Σ sequential PEFT steps / fused step
      batching  of it: the bare base one tenant at a time / all in one batch
      overhead  of it: the rest (PEFT's overhead against ours)
    floor       the overhead if the multiplications of A and B were all that it consists of

With a real base it also prints what it saves to run the head on the trained tokens only: four
tenants of 224 tokens, a quarter of them trained, against the same step with everything trained
(which is what it costs to run the head on every row), against one that reads every log-probability,
and against PEFT with the trained rows selected before the head. The memory of the loss and the
bytes that an adapter holds are counted rather than timed.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.arms import (
    ARMS,
    RANKS,
    Fused,
    Load,
    arithmetic_floor,
    arms,
    make_load,
    trained_arms,
)
from benchmarks.memory import loss_memory

# The goals for a real base: overhead at most, speed-up at least. Others are reported.
TARGETS: dict[int, tuple[float, float | None]] = {
    32: (1.15, 1.75),
    128: (1.06, 1.2),
    512: (1.04, None),
}
# With a real base: rounds and arms for each number of tokens.
REAL: dict[int, tuple[int, Sequence[str]]] = {
    32: (7, ("fused", "bare", "bare_sequential", "peft")),
    128: (4, ("fused", "bare", "bare_sequential", "peft")),
    512: (3, ("fused", "bare")),
}
TRAINED_RANKS, TRAINED_TOKENS, TRAINED_SHARE = (8, 16, 32, 4), 224, 0.25
TRAINED_GOALS = (0.15, 1.15)


def toy_llama(folder: Path) -> Path:
    """Make a Llama: hidden 256, MLP 688, 4 layers, vocabulary 8192, weights from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def interleaved(
    arms: dict[str, Callable[[], None]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Return thread CPU seconds of every arm by round, after some to warm up; arms take turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds + warm_up):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            began = time.thread_time()
            arms[name]()
            if number >= warm_up:
                times[name].append(time.thread_time() - began)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, float, float]:
    """Return the median, 10th and 90th percentile of the rounds' ratios."""
    ratios = sorted(a / b for a, b in zip(times[over], times[under], strict=True))
    return statistics.median(ratios), ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]


def measure(
    name: str, load: Load, rounds: int, chosen: Sequence[str] = ARMS, warm_up: int = 2
) -> dict[str, Any]:
    """Measure one row of the table."""
    times = interleaved(arms(load, chosen), rounds, warm_up)
    medians = {arm: statistics.median(seconds) for arm, seconds in times.items()}
    row: dict[str, Any] = {
        "model": name,
        "tokens_per_tenant": load.tokens,
        "overhead_step": ratio(times, "fused", "bare"),
        "floor": arithmetic_floor(load.base, list(load.ranks.values())),
        "tokens_per_second": load.tokens * len(load.ranks) / medians["fused"],
    }
    if "fused_fb" in chosen:
        row["overhead_forward_backward"] = ratio(times, "fused_fb", "bare")
    if "peft" in chosen:
        speedup, batching = ratio(times, "peft", "fused"), ratio(times, "bare_sequential", "bare")
        row |= {
            "speedup": speedup,
            "of_it_batching": batching,
            "of_it_overhead": speedup[0] / batching[0],
        }
    return row | {"milliseconds": {arm: median * 1e3 for arm, median in medians.items()}}


def measure_trained(base: Path, rounds: int) -> dict[str, Any]:
    """Measure the head on the trained tokens only."""
    load, whole = (
        make_load(base, 2000, TRAINED_TOKENS, TRAINED_RANKS, share)
        for share in (TRAINED_SHARE, 1.0)
    )
    times = interleaved(trained_arms(load, whole), rounds, warm_up=1)
    return {
        "tokens_per_tenant": TRAINED_TOKENS,
        "ranks": TRAINED_RANKS,
        "trained": TRAINED_SHARE,
        "of_everything_trained": ratio(times, "trained_only", "everything_trained"),
        "of_all_read": ratio(times, "trained_only", "all_read"),
        "speedup_over_peft_selecting": ratio(times, "peft_selecting", "trained_only"),
        "milliseconds": {arm: statistics.median(t) * 1e3 for arm, t in times.items()},
    }


def bytes_per_parameter(base: Path | str, vocab: int) -> float:
    """Return the bytes per parameter that an fp32 adapter holds after its first step."""
    fused = Fused(make_load(base, vocab, 32))
    fused.step()
    adapters = fused.engine.adapters.values()
    return sum(a.num_bytes() for a in adapters) / sum(a.layout.num_params for a in adapters)


def machine() -> dict[str, str | int]:
    """Return what the figures were measured on."""
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


def show(row: dict[str, Any], *, real: bool) -> None:
    """Print a row, with its goals if it has any."""
    most, least = TARGETS[row["tokens_per_tenant"]] if real else (None, None)
    parts = [
        f"{row['model']:9} {row['tokens_per_tenant']:4}",
        f"overhead {_spread(row['overhead_step'], most, '≤')}, floor {row['floor']:.2f}",
    ]
    if "overhead_forward_backward" in row:
        parts.append(f"fwd+bwd {row['overhead_forward_backward'][0]:.2f}")
    if "speedup" in row:
        parts.append(
            f"speed-up {_spread(row['speedup'], least, '≥')} = "
            f"{row['of_it_batching'][0]:.2f} × {row['of_it_overhead']:.2f}"
        )
    parts.append(f"{row['tokens_per_second']:.0f} tokens/s")
    parts.append("ms: " + _times(row))
    print("  ".join(parts), flush=True)


def show_trained(row: dict[str, Any]) -> None:
    """Print what the head on the trained tokens saves."""
    less, more = TRAINED_GOALS
    parts = [
        f"a quarter trained: of a step's time "
        f"{_spread(row['of_everything_trained'], 1 - less, '≤')}",
        f"of one that reads all {_spread(row['of_all_read'])}",
        f"over PEFT that selects {_spread(row['speedup_over_peft_selecting'], more, '≥')}",
        f"ms: {_times(row)}",
    ]
    print("  ".join(parts), flush=True)


def _spread(ratios: tuple[float, float, float], goal: float | None = None, sign: str = "") -> str:
    wanted = "" if goal is None else f", goal {sign} {goal:.2f}"
    return f"{ratios[0]:.3f} ({ratios[1]:.2f}–{ratios[2]:.2f}{wanted})"


def _times(row: dict[str, Any]) -> str:
    return "  ".join(f"{arm} {ms:.0f}" for arm, ms in row["milliseconds"].items())


def measure_small(report: dict[str, Any], models: str, tokens: list[int], rounds: int) -> None:
    """Measure the rows of the toy and of seedling."""
    with tempfile.TemporaryDirectory() as scratch:
        bases: dict[str, Path | str] = {"toy": toy_llama(Path(scratch)), "seedling": "seedling"}
        for name in models.split(","):
            for count in tokens:
                row = measure(name, make_load(bases[name], 2000, count, report["ranks"]), rounds)
                report["rows"].append(row)
                show(row, real=False)
            memory = {"bytes_per_parameter": bytes_per_parameter(bases[name], 2000)}
            memory |= loss_memory(bases[name])
            report["memory"][name] = memory
            print(f"{name}: {memory}")


def measure_real(report: dict[str, Any], base: Path, tokens: list[int]) -> None:
    """Measure the rows of a real base."""
    for count in tokens:
        rounds, chosen = REAL[count]
        load = make_load(base, 2000, count, report["ranks"])
        row = measure(base.name, load, rounds, chosen, warm_up=1)
        report["rows"].append(row)
        show(row, real=True)
    report["trained"] = measure_trained(base, 5)
    show_trained(report["trained"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="of toy and seedling")
    parser.add_argument("--models", default="toy,seedling")
    parser.add_argument("--base", type=Path, help="a folder with a real base, instead of those")
    parser.add_argument("--tokens", default="32,128,512")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    tokens = [int(count) for count in options.tokens.split(",")]
    report: dict[str, Any] = {"machine": machine(), "ranks": ranks, "rows": [], "memory": {}}
    print(json.dumps(report["machine"]))
    if options.base:
        measure_real(report, options.base, tokens)
    else:
        measure_small(report, options.models, tokens, options.rounds)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
