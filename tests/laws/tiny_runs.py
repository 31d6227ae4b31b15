"""Whole runs on a tiny random base: its folder, three adapters' data, and the command line."""

import json
import os
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from manylora.runs.run_folder import RunPaths

REPO = Path(__file__).resolve().parents[2]
LETTERS = string.ascii_letters + string.digits + " =:+-.,?"


def make_base(folder: Path) -> Path:
    """A random two-layer Qwen3 and a tokenizer with a token per character."""
    words = ["<unk>", "<eos>", *LETTERS]
    tokenizer = Tokenizer(
        BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.08,
        eos_token_id=1,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, *, steps: int = 8) -> dict[str, Any]:
    """A run file's data: mixed ranks, targets, batch sizes, schedules, lengths and data."""
    tasks = {
        "double": lambda word: word + word,
        "reverse": lambda word: word[::-1],
        "upper": str.upper,
    }
    words = ["ab", "tree", "stone", "river", "cloud", "we", "paper", "lamp", "owl"]
    adapters: list[dict[str, Any]] = []
    for number, (name, task) in enumerate(tasks.items()):
        rows = [{"prompt": f"{name}: {word} =", "completion": task(word)} for word in words]
        write_lines(folder / f"{name}.jsonl", rows)
        write_lines(folder / f"{name}_eval.jsonl", rows[:3])
        adapters.append(
            {
                "name": name,
                "seed": number,
                "save_every": 3,
                "lora": {
                    "rank": (4, 1, 9)[number],
                    "alpha": 8.0,
                    "dropout": (0.0, 0.1, 0.0)[number],
                    "targets": ("all-linear", ["q_proj", "v_proj"], "all-linear")[number],
                },
                "optimizer": {"lr": 5e-3, "schedule": ("linear", "cosine", "constant")[number]},
                "sft": {
                    "train": str(folder / f"{name}.jsonl"),
                    "eval": str(folder / f"{name}_eval.jsonl"),
                    "batch_size": 2 + number,
                    "max_steps": steps + 2 * number,
                },
            }
        )
    return {
        "base": str(base),
        "out": str(folder / "out"),
        "token_budget": 256,
        "threads": 1,
        "tensorboard": False,
        "adapters": adapters,
    }


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(run: dict[str, Any], file: Path) -> subprocess.Popen[str]:
    """`manylora train` in a process of its own."""
    file.write_text(yaml.safe_dump(run))
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "manylora.cli.main", "train", str(file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def weights(out: str | Path, name: str) -> bytes:
    return (RunPaths(Path(out)).adapter(name).final / "adapter_model.safetensors").read_bytes()


def losses(out: str | Path, name: str) -> list[Any]:
    """Everything in metrics.jsonl but the time that it took."""
    text = RunPaths(Path(out)).adapter(name).metrics.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def summary(out: str | Path) -> dict[str, Any]:
    return json.loads(RunPaths(Path(out)).summary.read_text())
