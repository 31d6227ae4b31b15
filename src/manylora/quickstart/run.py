"""`manylora quickstart` writes the tasks as a run, trains it, and asks all adapters the same."""

import json
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manylora.config import load_run_file
from manylora.quickstart.tasks import SHOWCASE, TASKS, Split, Task, examples, prompt_for
from manylora.runs.encode import Encoder
from manylora.runs.train import train_run_file
from manylora.types import SamplingParams

BASE = "seedling"
SHOWN = SHOWCASE[:3]
RUN_FILE = "quickstart.yaml"


def main(*, out: Path, steps: int | None = None, overwrite: bool = False) -> int:
    """Train the eight tasks' adapters together, show what they do, and return the run's exit code.

    Args:
        out: folder for data, run file and results.
        steps: optimizer steps of every adapter, in place of its own number.
        overwrite: start afresh; otherwise a ConfigError is raised if `out` holds another run.
    """
    run_file = write_run(out, steps)
    code = train_run_file(load_run_file(run_file), overwrite=overwrite)
    if code == 0:
        show_side_by_side(out, Console())
    return code


def write_run(out: Path, steps: int | None) -> Path:
    """Write the tasks' data and a run file that can be edited and started again."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        _write_examples(data / f"{task.name}.jsonl", task, "train")
        _write_examples(data / f"{task.name}.eval.jsonl", task, "held_out")
    run = {
        "base": BASE,
        "out": str(out),
        "token_budget": 4096,
        "adapters": [_entry(task, steps or task.steps) for task in TASKS],
    }
    run_file = out / RUN_FILE
    run_file.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    return run_file


def show_side_by_side(out: Path, console: Console) -> None:
    """Answer the same prompts with the base and with every adapter, in one decode loop."""
    # Here, so that the command line can read the tasks without torch.
    from manylora.api import Trainer

    params = SamplingParams(max_tokens=24)
    asked = [prompt_for(word) for word in SHOWN]
    with Trainer(BASE) as trainer:
        encoder = Encoder(trainer.tokenizer)
        prompts = [encoder.prompt(prompt) for prompt in asked]
        answers = [("base", "no adapter", trainer.sample(prompts, params))]
        for task in TASKS:
            adapter = trainer.create(task.name, init_from=out / task.name / "final")
            answers.append((task.name, task.description, adapter.sample(prompts, params)))
        table = Table("", *asked, "the adapter was shown", box=SIMPLE_HEAD, pad_edge=False)
        for name, description, future in answers:
            texts = [_text(trainer.tokenizer, s.tokens) for s in future.result().sequences]
            table.add_row(name, *map(Text, texts), Text(description, style="dim"))
    console.print(
        "One base model, nine answers to the same prompt (these words were in no training data):"
    )
    console.print(table)
    console.print(f"The run file is {out / RUN_FILE}: change it and start it again with")
    console.print(f"  manylora train {out / RUN_FILE} --overwrite", soft_wrap=True)


def _entry(task: Task, steps: int) -> dict[str, Any]:
    targets = list(task.targets) if isinstance(task.targets, tuple) else task.targets
    return {
        "name": task.name,
        "lora": {"rank": task.rank, "alpha": task.alpha, "targets": targets},
        "optimizer": {"lr": task.learning_rate, "schedule": "cosine", "warmup_steps": 10},
        "sft": {
            "train": f"data/{task.name}.jsonl",
            "eval": f"data/{task.name}.eval.jsonl",
            "batch_size": task.batch_size,
            "max_steps": steps,
        },
        "save_every": 50,
    }


def _write_examples(path: Path, task: Task, split: Split) -> None:
    lines = [json.dumps(example) + "\n" for example in examples(task, split)]
    path.write_text("".join(lines), encoding="utf-8")


def _text(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
    first, *rest = text.splitlines() or [""]
    return first + " …" if rest else first
