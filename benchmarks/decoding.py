"""This benchmark continues prompts, by our loop and by transformers' `generate` with PEFT.

    python -m benchmarks.decoding BASE [--dtype fp32] [--streams 1,8,64] [--rounds 5]
                                       [--tokens 48] [--threads 1] [--out FILE.json]

Each stream continues a prompt of 32 random tokens greedily; the streams are dealt out to eight
adapters of ranks 4 to 32 on every linear layer (one stream: rank 8). The arms take turns, and the
report is tokens per second of CPU time (with several threads, of wall time): median and range of
the rounds, reading the prompt included. `generate` has one adapter in a call and is measured with
one stream; with more it answers one after another. Both must choose the same tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arms import RANKS
from benchmarks.multi_tenant import machine
from manylora.checkpoint import export_peft
from manylora.engine import Engine
from manylora.models import resolve_base
from manylora.types import AdapterSpec, ManyloraError, Opening, Sample, SamplingParams

PROMPT = 32
# Which adapter answers where there is one stream: rank 8.
ALONE = 2
NOISE = 0.005

Answers = list[tuple[int, ...]]


def prompts(count: int, vocab: int) -> list[np.ndarray]:
    """Make `count` prompts, always the same."""
    return list(np.random.default_rng(1).integers(3, vocab, (count, PROMPT)))


def adapter_of(stream: int, streams: int) -> int:
    """Return the number of the adapter that continues a stream."""
    return ALONE if streams == 1 else stream % len(RANKS)


class Ours:
    """`Ours` is an engine with eight adapters."""

    def __init__(self, base: str, dtype: str):
        self.engine = Engine(Opening(str(base), dtype=dtype))
        rng = np.random.default_rng(0)
        for number, rank in enumerate(RANKS):
            adapter = self.engine.create(f"a{number}", AdapterSpec(rank=rank, alpha=2 * rank))
            noise_P = rng.standard_normal(adapter.layout.num_params, np.float32) * NOISE
            adapter.weights.weights_P.add_(torch.from_numpy(noise_P))
            adapter.publish()

    def answer(self, streams: int, tokens: int) -> Answers:
        """Return the new tokens of each stream."""
        params = SamplingParams(max_tokens=tokens, temperature=0.0, stop=())
        asked = [
            Sample(adapter=f"a{adapter_of(number, streams)}", prompts=[prompt], params=params)
            for number, prompt in enumerate(prompts(streams, self.engine.base.vocab_size))
        ]
        answers: Answers = []
        for result in self.engine.sample(asked):
            if isinstance(result, ManyloraError):
                raise result
            answers.append(result.sequences[0].tokens)
        return answers

    def export(self, folder: Path) -> None:
        """Write the adapter that answers alone."""
        state = self.engine.state(f"a{ALONE}")
        export_peft(
            folder,
            state.spec,
            state.layout,
            state.weights,
            base_name="base",
            sites=self.engine.sites,
        )


class Generate:
    """`Generate` is transformers with one adapter from PEFT."""

    def __init__(self, base: str, dtype: str, adapter: Path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve_base(base), dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        )
        self.model: Any = PeftModel.from_pretrained(model, adapter).eval()

    @torch.no_grad()
    def answer(self, tokens: int) -> Answers:
        """Return the new tokens of one stream."""
        (prompt,) = prompts(1, self.model.config.vocab_size)
        asked = torch.from_numpy(prompt)[None]
        out = self.model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
        return [tuple(out[0, PROMPT:].tolist())]


def interleaved(
    arms: dict[str, Callable[[], Answers]], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, Answers]]:
    """Return every arm's tokens per second in each round, after one to warm up; and its answers."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, Answers] = {}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            began = clock()
            answers[name] = arm()
            if number:
                count = sum(len(answer) for answer in answers[name])
                rates[name].append(count / (clock() - began))
    return rates, answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine() | {"threads": options.threads, "dtype": options.dtype}
    print(json.dumps(about), flush=True)
    ours = Ours(options.base, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        ours.export(Path(folder) / "adapter")
        generate = Generate(options.base, options.dtype, Path(folder) / "adapter")
    tokens = options.tokens
    arms: dict[str, Callable[[], Answers]] = {"generate": lambda: generate.answer(tokens)}
    for streams in map(int, options.streams.split(",")):
        arms[f"{streams} streams"] = lambda streams=streams: ours.answer(streams, tokens)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    rates, answers = interleaved(arms, options.rounds, clock)
    for name, found in rates.items():
        print(f"{name:12} {statistics.median(found):7.1f} ({min(found):.1f} to {max(found):.1f})")
    if "1 streams" in answers:
        same = answers["1 streams"] == answers["generate"]
        print("generate chose the same tokens" if same else f"other tokens: {answers}")
    if options.out:
        report = {"machine": about, "tokens": tokens, "rates": rates}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
