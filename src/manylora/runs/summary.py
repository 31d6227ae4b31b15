"""A run ends by printing a table, where things are, and what to try next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manylora.runs.board import clock_text, printable, shown
from manylora.runs.columns import CourseColumns
from manylora.runs.events import RunEnded
from manylora.runs.run_folder import read_json

MAX_PROMPT = 80
MOST_SHOWN = 8
STYLES = {"completed": "green", "failed": "bold red", "cancelled": "yellow"}
STYLES |= {"training": "cyan", "waiting": "dim"}


def print_summary(event: RunEnded, console: Console, columns: Mapping[str, CourseColumns]) -> None:
    """Print the table of adapters with these figures, the errors in full, and the paths."""
    adapters: dict[str, dict[str, Any]] = event.summary["adapters"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("adapter", "status"):
        table.add_column(name, no_wrap=True)
    changes = {name: _changes(entry, columns[name]) for name, entry in adapters.items()}
    labels = list(dict.fromkeys(label for found in changes.values() for label in found))
    for name in ("steps", *labels):
        table.add_column(name, justify="right", no_wrap=True)
    for name, entry in adapters.items():
        table.add_row(
            name,
            Text(entry["status"], style=STYLES.get(entry["status"], "")),
            f"{entry['steps']:,}/{entry['total_steps']:,}",
            *(changes[name].get(label, "–") for label in labels),
        )
    console.print(table)
    for name, entry in adapters.items():
        if entry["error"]:
            error = entry["error"]
            text = printable(f"{name}: {error['type']}: {error['message']}")
            console.print(Text(text, style="red"))
    _print_rate(event.summary, console)
    _print_paths(event, console)


def _changes(entry: Mapping[str, Any], columns: CourseColumns) -> dict[str, str]:
    """Return an adapter's figures at first and at last, each under its label."""
    before, after = entry["eval_before"] or {}, entry["eval_after"] or {}
    ends = [(c, entry[f"first_{c.name}"], entry[f"last_{c.name}"]) for c in columns.ends()]
    ends += [(c, before.get(c.name), after.get(c.name)) for c in columns.evaluation if c.label]
    return {c.label: _change(shown(c, first), shown(c, last)) for c, first, last in ends}


def _change(before: str, after: str) -> str:
    return before if after == "–" else f"{before} → {after}"


def _print_rate(summary: dict[str, Any], console: Console) -> None:
    if summary["tokens"]:
        spent, evaluation = summary["training_seconds"], summary["evaluation_seconds"]
        speed = summary["tokens_per_second"] or 0
        console.print(
            f"{summary['tokens']:,} tokens trained in {clock_text(spent)}, {speed:,.0f} tokens/s; "
            f"evaluation {clock_text(evaluation)}; {clock_text(summary['seconds'])} in all"
        )


def _print_paths(event: RunEnded, console: Console) -> None:
    out = Path(event.out)
    completed = [n for n, e in event.summary["adapters"].items() if e["status"] == "completed"]
    lines = [("report", out / "report.html"), ("summary", out / "summary.json")]
    lines += [("adapter", out / name / "final") for name in completed[:MOST_SHOWN]]
    for label, path in lines:
        if path.exists():
            console.print(Text(f"  {label:<8} {path}"), soft_wrap=True)
    if len(completed) > MOST_SHOWN:
        console.print(Text(f"           and {len(completed) - MOST_SHOWN} more"))
    if len(completed) < len(event.summary["adapters"]):
        console.print("Start the same command again: completed adapters stay as they are, the")
        console.print("others go on from their newest checkpoint.")
    else:
        # `completed` is in the file's order; the first adapter is as good as any.
        command = ["manylora", "sample", "--adapter", str(out / completed[0])]
        prompt = _first_prompt(out / completed[0] / "samples.json")
        command += ["--prompt", prompt] if prompt else []
        console.print(Text(f"  try      {shlex.join(command)}"), soft_wrap=True)


def _first_prompt(samples: Path) -> str | None:
    """Return a prompt that the adapter was asked, if it fits a command line."""
    found = read_json(samples)
    answers = found.get("after") if isinstance(found, dict) else None
    prompt = str(answers[0]["prompt"]) if answers else ""
    return prompt if 0 < len(prompt) <= MAX_PROMPT and prompt.isprintable() else None
