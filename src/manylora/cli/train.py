"""`manylora train`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from manylora.runs.footprint import MemoryPlan
    from manylora.runs.plan import RunPlan


@click.command(
    epilog="Example: manylora train run.yaml --set adapters.reverse.optimizer.lr=1e-3",
    short_help="Train all adapters of a run file; goes on where it was stopped.",
)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a setting, such as token_budget=2048 or adapters.NAME.sft.max_steps=5. "
    "May be repeated.",
)
@click.option("--mesh", help="Processes, such as dp=2,tp=2 or replicas=2 [1].")
@click.option("--ray", metavar="ADDRESS", help="Use a Ray cluster's devices: auto or HOST:PORT.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier run left in `out`.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print events (or the plan) as JSON.")
def train(
    run_file: Path,
    overrides: tuple[str, ...],
    mesh: str | None,
    ray: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Train all adapters of a run file; goes on where it was stopped."""
    from manylora.config import load_run_file
    from manylora.types.mesh import MeshShape

    given = {"mesh": mesh, "ray": ray}
    options = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    run = load_run_file(run_file, (*overrides, *options))
    if dry_run:
        from manylora.runs.plan import plan_run

        plan = plan_run(run)
        click.echo(json.dumps(plan.to_json(), indent=2) if as_json else plan_text(plan))
        for warning in plan.warnings():
            click.echo(f"warning: {warning}", err=True)
        refusal = plan.memory.refusal()
        if refusal is not None:
            raise refusal
        return 0
    from manylora.processes.started import started_by_others

    started = started_by_others()
    if started is not None:
        started.check(MeshShape.parse(run.mesh))
        if started.world_rank > 0:
            started.serve(run.out)
            return 0
    from manylora.runs.train import train_run_file

    return int(train_run_file(run, overwrite=overwrite, view="json" if as_json else "auto"))


def plan_text(plan: "RunPlan") -> str:
    """The plan as a table for people."""
    from manylora.types.memory import bytes_text

    context = f", context {plan.context_length}" if plan.context_length else ""
    head = f"base {plan.base}: {plan.architecture}, {plan.base_params:,} parameters{context}"
    titles = (
        "adapter", "rank", "layers", "parameters", "memory", "examples", "eval", "batch", "steps",
        "tokens", "longest",
    )  # fmt: skip
    rows = [
        (
            adapter.name,
            "–".join(map(str, dict.fromkeys(adapter.rank))),
            str(adapter.num_targets),
            f"{adapter.num_params:,}",
            bytes_text(adapter.num_bytes),
            f"{adapter.num_examples:,}",
            f"{adapter.num_eval_examples:,}",
            f"{adapter.batch_size:,}",
            f"{adapter.steps:,}",
            f"{adapter.num_tokens:,}",
            f"{adapter.longest:,}",
        )
        for adapter in plan.adapters
    ]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (titles, *rows)
    ]
    return "\n".join([head, "", *lines, "", *memory_lines(plan.memory), f"out: {plan.out}"])


def memory_lines(memory: "MemoryPlan") -> list[str]:
    """The memory of a process, part by part."""
    from manylora.types.memory import bytes_text

    other = memory.recomputed if memory.activations == memory.plain else memory.plain
    way = "with" if memory.activations == memory.plain else "without"
    rows = [
        ("interpreter, libraries, data", bytes_text(memory.process)),
        ("base", bytes_text(memory.base)),
        ("adapters with optimizer", bytes_text(memory.adapters)),
        (
            "activations",
            bytes_text(memory.activations)
            + (f" ({bytes_text(other)} {way} activation_checkpointing)" if other else ""),
        ),
    ]
    if memory.decode_cache:
        rows.append(("or decode cache of evaluation", bytes_text(memory.decode_cache)))
    each = f" in each of {memory.ranks} processes" if memory.ranks > 1 else ""
    rows.append((f"at the peak{each}", f"about {bytes_text(memory.total)}"))
    width = max(len(title) for title, _ in rows)
    return ["memory", *(f"  {title.ljust(width)}  {text}" for title, text in rows), ""]
