"""Writes what a run of reinforcement learning leaves on disk, without training anything."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manylora.runs.rl.step_figures import rl_columns
from manylora.runs.run_folder import RunPaths, write_json, write_text

COLUMNS = rl_columns(["digits"])
# As `TokenTexts` asks of a tokenizer: an id's text stands for it, and all are joined.
WORDS = {1: "Ask", 2: " me", 3: " more", 4: "Well", 5: ", yes", 6: "<end>", 7: "\n", 8: " tool:7"}


class WordTokenizer:
    """A `WordTokenizer` has a text for each id."""

    def __init__(self, words: dict[int, str] | None = None) -> None:
        self.words = words or WORDS

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(self.words.get(one, f" t{one}") for one in ids)


def segment(given: Sequence[int], drawn: Sequence[int], version: int = 0) -> dict[str, Any]:
    """One segment: tokens that were given, then tokens that were drawn."""
    places = list(range(len(given), len(given) + len(drawn)))
    return {
        "tokens": [*given, *drawn],
        "sampled": places,
        "logprobs": [-0.5 * (1 + n % 3) for n in range(len(drawn))],
        "versions": [version] * len(drawn),
    }


def rollout(reward: float, *segments: dict[str, Any], **others: Any) -> dict[str, Any]:
    """One sample; by default of one turn."""
    made = {
        "segments": list(segments) or [segment([1, 2], [4, 5, 6])],
        "reward": reward,
        "parts": {"digits": reward},
        "text": "Well, yes",
        "stop_reason": "stop",
        "turns": 1,
        "metrics": {},
        "seconds": 1.5,
        "reward_seconds": 0.1,
    }
    return made | others


def group(
    step: int, number: int, row: int, rollouts: Sequence[dict[str, Any]], **others: Any
) -> dict[str, Any]:
    """One group as a step's file has it; its advantages are R - mean."""
    mean = sum(one["reward"] for one in rollouts) / max(1, len(rollouts))
    made = {
        "step": step,
        "group": number,
        "row": row,
        "version": max(0, step - 2),
        "rollouts": list(rollouts),
        "errors": [],
        "advantages": [one["reward"] - mean for one in rollouts],
    }
    return made | others


def step_bytes(groups: Sequence[dict[str, Any]]) -> bytes:
    """What `rollout_record.py::RolloutRecord.write_step` writes."""
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in groups)
    return gzip.compress(text.encode("utf-8"), 1, mtime=0)


def write_step(folder: Path, step: int, groups: Sequence[dict[str, Any]]) -> None:
    """Write the rollouts of one step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-{step}.jsonl.gz").write_bytes(step_bytes(groups))


def metrics_row(step: int, adapter: int = 0) -> dict[str, Any]:
    """A line of metrics.jsonl with a value for every figure, none of them a round one."""
    figures: dict[str, Any] = {
        one.name: (step % 97) / 97.123456789 + adapter / 3.0 for one in COLUMNS.step
    }
    figures |= {"version": step - 1, "staleness_max": min(step - 1, 1), "kl": None, "tokens": 99}
    return {"step": step, **figures, "seconds": 0.25}


def write_metrics(path: Path, steps: int, adapter: int = 0) -> None:
    """Write metrics.jsonl."""
    rows = (metrics_row(step, adapter) for step in range(1, steps + 1))
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def summary_entry(steps: int) -> dict[str, Any]:
    """What summary.json says of an adapter."""
    evaluations = [{"step": at, "reward": at / steps, "samples": 4} for at in (steps // 2, steps)]
    return {
        "status": "completed",
        "steps": steps,
        "total_steps": steps,
        "num_params": 64,
        "first_reward": -0.5,
        "last_reward": 0.75,
        "eval_before": {"reward": 0.1, "samples": 4},
        "eval_after": evaluations[-1],
        "evaluations": evaluations,
        "tokens": 99 * steps,
        "trained_tokens": 50 * steps,
        "error": None,
    }


def write_run(root: Path, adapters: Sequence[str], steps: int) -> RunPaths:
    """Write the files of a run but for its rollouts."""
    paths = RunPaths(root)
    for number, name in enumerate(adapters):
        write_metrics(paths.adapter(name).metrics, steps, number)
        answers = [
            {"prompt": "p", "expected": None, "answer": "a", "exact": None, "reward": 0.5}
        ] * 2
        write_json(paths.adapter(name).samples, {"before": answers, "after": answers})
    entries = {name: summary_entry(steps) for name in adapters}
    write_json(paths.summary, {"status": "completed", "base": "seedling", "adapters": entries})
    write_text(paths.run_yaml, "base: seedling\n")
    return paths
